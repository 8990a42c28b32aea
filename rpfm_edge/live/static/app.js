// The page: where poses come from, what is shown, and how long it took.

import { Link, now } from "./link.js";
import { animated, draw, moved, NAMES, nearest } from "./pose.js";
import { hasVideo, Video } from "./rtc.js";
import { enterAr, whyNoAr } from "./xr.js";

const FRAMES_KEPT = 240; // of which latency and frames per second are told
const REACH_PX = 28; // how far from a joint a finger may be, in pixels of the screen
const PHOTO_PX = 1024; // longest side of a photo that is sent
const OWN_CHOICE_MS = 1500; // so long the server's word on the source of poses may be older than ours
const MESSAGE_MS = 6000;
const STAGES = [
  "Pose on its way", "Waiting and drawing", "Rendering", "Encoding", "Picture on its way", "Decoding and showing",
];

const $ = (id) => document.getElementById(id);
const page = {
  size: [256, 176], mode: null, sources: ["client"], chosenAt: -Infinity, hand: null, joint: -1,
  facts: {}, next: null, current: null, measured: [], ar: null, warned: new Map(),
};
const link = new Link({
  open: opened, hello: learned, state: learned, person: learned, error: ({ message }) => say(message), frame: arrived,
  video: (message) => video.answered(message).catch(noVideo),
});
const video = new Video(
  (message) => link.send(message), (frame) => arrived({ ...frame, sent: link.sentAt(frame.header) }), noVideo,
);

// What the server says

function opened(open, why) {
  $("status").dataset.open = open;
  $("status").textContent = open ? "Connected" : why ?? "Reconnecting …";
}

function learned(message) {
  Object.assign(page.facts, message);
  if (message.size && String(message.size) !== String(page.size)) resize(message.size);
  if (message.type === "hello") {
    fit();
    $("transport").hidden = !(hasVideo && message.pictures?.includes("webrtc"));
    carry(); // a new connection begins with JPEGs
  }
  page.sources = message.sources ?? page.sources;
  for (const label of document.querySelectorAll("[data-source]")) {
    label.hidden = !page.sources.includes(label.dataset.source);
  }
  offerSteps(message.steps_available ?? []);
  warn(message.source_errors ?? {});
  if (message.source_of_poses) follow(message.source_of_poses, message.clients ?? 1);
  else if (!page.mode) show("animated");
  describe();
}

/** Poses are pixels of the picture: one that is held by hand moves with its size. */
function resize([height, width]) {
  const scale = [width / page.size[1], height / page.size[0]];
  page.hand = page.hand?.map((point) => point && point.map((value, i) => value * scale[i])) ?? null;
  page.size = [height, width];
}

/** Go along with the source of poses that the whole service has. */
function follow(source, clients) {
  if (performance.now() - page.chosenAt < OWN_CHOICE_MS) return;
  const theirs = ["motion", "camera"];
  if (theirs.includes(source)) show(source);
  else if (!page.mode) show(clients > 1 ? "watch" : "animated"); // somebody else is at the wheel
  else if (theirs.includes(page.mode)) show("watch");
}

/** Let one fix the number of steps, where there are several. */
function offerSteps(available) {
  const choices = $("steps").querySelector(".choices");
  if (available.length < 2 || choices.children.length) return;
  for (const steps of [0, ...available]) {
    const label = document.createElement("label");
    label.innerHTML = `<input type="radio" name="steps"><span></span>`;
    label.lastChild.textContent = steps || "By deadline";
    label.firstChild.checked = steps === 0;
    label.firstChild.addEventListener("change", () => link.setOptions({ steps }));
    choices.append(label);
  }
  $("steps").hidden = false;
}

/** Receive frames as the page says: as JPEGs, or as a video track. */
function carry() {
  const before = video.connection;
  video.close();
  const webrtc = !$("transport").hidden && document.querySelector("[name=transport]:checked").value === "webrtc";
  if (webrtc) video.open().catch(noVideo);
  else if (before) link.send({ type: "video", sdp: null });
  link.channel = video.channel;
}

function noVideo(error) {
  say(`No video: ${error.message}.`);
  document.querySelector("[name=transport][value=jpeg]").checked = true;
  carry();
}

/** Say once what went wrong with a source of poses. */
function warn(errors) {
  for (const [name, error] of Object.entries(errors)) {
    if (page.warned.get(name) !== error) say(`${name}: ${error}`);
    page.warned.set(name, error);
  }
}

function describe() {
  const { backend, steps, person, clients } = page.facts;
  const [height, width] = page.size;
  const parts = [`${width} × ${height}`, backend, steps && `${steps} step${steps > 1 ? "s" : ""}`,
    person !== undefined && `person ${person}`, clients > 1 && `${clients} clients`];
  $("facts").textContent = parts.filter(Boolean).join(" · ");
}

// Poses

function show(mode) {
  if (mode === page.mode) return;
  if (mode === "hand") page.hand ??= (pose() ?? animated(0, page.size)).map((point) => point && [...point]);
  page.mode = mode;
  document.querySelector(`input[name=mode][value=${mode}]`).checked = true;
  $("pose-help").hidden = !["animated", "hand"].includes(mode);
}

function choose(mode) {
  page.chosenAt = performance.now();
  if (mode === "hand") page.hand = null; // start from what is shown
  show(mode);
  const source = { animated: "client", hand: "client", motion: "motion", camera: "camera" }[mode];
  if (source && (page.facts.source_of_poses ?? "client") !== source) {
    page.facts.source_of_poses = source;
    link.setOptions({ source_of_poses: source });
  }
}

/** The pose that drives the picture, as far as this page knows it. */
function pose() {
  if (page.mode === "animated") return animated(performance.now() / 1000, page.size);
  if (page.mode === "hand") return page.hand;
  return page.current?.header.pose ?? null;
}

function drives() {
  return page.mode === "animated" || page.mode === "hand";
}

function at(event) {
  const box = $("pose").getBoundingClientRect();
  const [height, width] = page.size;
  return [((event.clientX - box.left) * width) / box.width, ((event.clientY - box.top) * height) / box.height];
}

function grab(event) {
  const from = pose();
  if (!from || !drives()) return;
  const reach = (REACH_PX * page.size[1]) / $("pose").getBoundingClientRect().width;
  const joint = nearest(from, at(event), reach);
  if (joint < 0) return;
  choose("hand");
  page.hand = from;
  mark(joint);
  page.last = at(event);
  $("pose").setPointerCapture(event.pointerId);
}

function drag(event) {
  if (!page.last) return;
  const point = at(event);
  page.hand = moved(page.hand, page.joint, [point[0] - page.last[0], point[1] - page.last[1]], page.size);
  page.last = point;
}

function mark(joint) {
  page.joint = joint;
  $("joint").textContent = NAMES[joint];
}

function key(event) {
  const arrows = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };
  const turn = { n: 1, p: -1 }[event.key.toLowerCase()];
  if (event.ctrlKey || event.metaKey || event.altKey) return; // the browser's own
  if (!drives() || !(turn || event.key in arrows)) return;
  event.preventDefault();
  if (page.mode !== "hand") choose("hand");
  if (turn) return mark((Math.max(page.joint, turn > 0 ? -1 : 0) + turn + NAMES.length) % NAMES.length);
  const step = (event.shiftKey ? 8 : 2) * (page.size[0] / 256);
  if (page.joint < 0) mark(4);
  page.hand = moved(page.hand, page.joint, arrows[event.key].map((value) => value * step), page.size);
}

// Frames

function arrived(frame) {
  if (page.next) {
    page.next.bitmap.close();
    link.skipped += 1;
  }
  page.next = { ...frame, stacked: frame.header.matte === "stacked" };
}

/** Once per frame of the display: send a pose, show the newest frame, and tell when the last one was on screen. */
function tick(time) {
  const stamp = performance.timeOrigin + time;
  if (page.current && !page.current.shown) tell(page.current, stamp); // drawn one frame ago: now it is visible
  if (drives() && link.ready()) link.pose(pose(), page.size);
  if (page.next) {
    page.current?.bitmap.close();
    page.current = page.next;
    page.next = null;
    if (!page.ar) paint(page.current);
    if (page.facts.person !== page.current.header.person || page.facts.steps !== page.current.header.steps) {
      page.facts.person = page.current.header.person;
      page.facts.steps = page.current.header.steps;
      describe();
    }
  }
  if (!page.ar) paintPose();
}

function paint({ bitmap, stacked }) {
  const canvas = $("picture");
  const height = stacked ? bitmap.height / 2 : bitmap.height;
  if (canvas.width !== bitmap.width || canvas.height !== height) Object.assign(canvas, { width: bitmap.width, height });
  canvas.getContext("2d").drawImage(bitmap, 0, 0);
  $("picture-empty").hidden = true;
}

function paintPose() {
  const shown = pose();
  draw($("pose"), shown, page.size, page.mode === "hand" ? page.joint : -1);
  $("pose-empty").hidden = Boolean(shown) || !page.current;
}

function tell(frame, shown) {
  frame.shown = shown;
  link.shown(frame, shown);
  page.measured = [...page.measured.slice(1 - FRAMES_KEPT), { shown, stages: split(frame) }];
}

/** Milliseconds of each of STAGES; null where it cannot be told. */
function split({ header, received, shown, sent }) {
  const { pose_in, drawn, rendered, encoded } = header.times_ms;
  const ours = (server) => (link.offset === null ? NaN : server - link.offset);
  const moments = [sent ?? NaN, ours(pose_in), ours(drawn), ours(rendered), ours(encoded), received, shown];
  const known = (value) => (Number.isNaN(value) ? null : Math.max(0, value));
  return STAGES.map((_, i) => known(moments[i + 1] - moments[i]));
}

// Figures

function percentile(values, share) {
  const sorted = values.toSorted((a, b) => a - b);
  return sorted[Math.min(sorted.length - 1, Math.floor(share * sorted.length))];
}

const figure = (values, share) => (values.length ? percentile(values, share).toFixed(1) : "–");

function measure() {
  const recent = page.measured.filter(({ shown }) => shown > now() - 2000);
  $("fps").textContent = recent.length > 1 ? `${rate(recent).toFixed(0)} fps` : "–";
  const columns = STAGES.map((_, i) => page.measured.map(({ stages }) => stages[i]).filter((value) => value !== null));
  const whole = page.measured.filter(({ stages }) => !stages.includes(null));
  const totals = whole.map(({ stages }) => stages.reduce((sum, value) => sum + value, 0));
  columns.forEach((values, i) => {
    fill($("stages").rows[i], values);
    $("bar").children[i].style.flex = values.length ? percentile(values, 0.5) : 0;
  });
  fill($("stages").rows[STAGES.length], totals);
  $("total").textContent = totals.length ? `${figure(totals, 0.5)} ms` : "–";
}

const rate = (frames) => (1000 * (frames.length - 1)) / (frames.at(-1).shown - frames[0].shown);

function fill(row, values) {
  row.cells[1].textContent = figure(values, 0.5);
  row.cells[2].textContent = figure(values, 0.95);
}

function build() {
  [...STAGES, "Together"].forEach((name, i) => {
    const row = $("stages").insertRow();
    row.innerHTML = `<th scope="row"></th><td>–</td><td>–</td>`;
    row.cells[0].textContent = name;
    const colour = `var(--stage-${i})`;
    row.style.setProperty("--stage", colour);
    if (i < STAGES.length) $("bar").appendChild(document.createElement("i")).style.background = colour;
  });
}

// The photo

async function upload(file) {
  if (!file) return;
  $("upload-note").textContent = "Sending …";
  try {
    const body = new FormData();
    body.append("picture", await smaller(file), file.name);
    const response = await fetch(`api/source${location.search}`, { method: "POST", body });
    const answer = await response.json().catch(() => ({}));
    if (!response.ok) throw new Error(answer.message ?? `The server refused the photo (${response.status}).`);
    URL.revokeObjectURL($("source").src);
    Object.assign($("source"), { src: URL.createObjectURL(file), hidden: false });
    $("upload-note").textContent = `Sent: person ${answer.person}. The server keeps it in memory only.`;
  } catch (error) {
    $("upload-note").textContent = "The photo was not taken.";
    say(error instanceof TypeError ? "The server cannot be reached." : error.message);
  }
}

/** A photo no larger than needed, turned upright; what this browser cannot read goes to the server as it is. */
async function smaller(file) {
  try {
    const bitmap = await createImageBitmap(file);
    const scale = PHOTO_PX / Math.max(bitmap.width, bitmap.height);
    if (scale >= 1) return file;
    const canvas = document.createElement("canvas");
    Object.assign(canvas, { width: Math.round(bitmap.width * scale), height: Math.round(bitmap.height * scale) });
    canvas.getContext("2d").drawImage(bitmap, 0, 0, canvas.width, canvas.height);
    bitmap.close();
    return await new Promise((done) => canvas.toBlob((blob) => done(blob ?? file), "image/jpeg", 0.92));
  } catch {
    return file;
  }
}

// AR

async function offerAr() {
  const why = await whyNoAr();
  $("ar").hidden = why !== null;
  $("ar-note").textContent = why ?? "Life size, two metres ahead of you. Select brings the person to where you look.";
}

async function startAr() {
  try {
    link.setOptions({ matte: "stacked" }, true);
    page.ar = await enterAr({ newest: () => page.current, tick, ended: endAr });
    $("ar").textContent = "Leave AR";
  } catch (error) {
    endAr();
    say(`AR did not start: ${error.message}`);
  }
}

function endAr() {
  page.ar = null;
  $("ar").textContent = "Enter AR";
  link.setOptions({ matte: "none" }, true);
}

// The page itself

function say(message) {
  $("message").textContent = message;
  $("message").hidden = false;
  clearTimeout(page.silence);
  page.silence = setTimeout(() => ($("message").hidden = true), MESSAGE_MS);
}

/** Frames in the picture's aspect, and as many pixels for the pose as the screen has. */
function fit() {
  document.documentElement.style.setProperty("--aspect", page.size[1] / page.size[0]);
  const box = $("pose").getBoundingClientRect();
  const scale = window.devicePixelRatio || 1;
  Object.assign($("pose"), { width: Math.round(box.width * scale), height: Math.round(box.height * scale) });
}

function loop(time) {
  requestAnimationFrame(loop);
  if (!page.ar) tick(time);
}

build();
fit();
new ResizeObserver(fit).observe($("pose"));
for (const input of document.querySelectorAll("[name=mode]")) {
  input.addEventListener("change", () => choose(input.value));
}
for (const input of document.querySelectorAll("[name=transport]")) input.addEventListener("change", carry);
$("file").addEventListener("change", async () => {
  await upload($("file").files[0]);
  $("file").value = ""; // so that the same photo can be chosen again
});
$("pose").addEventListener("pointerdown", grab);
$("pose").addEventListener("pointermove", drag);
for (const name of ["pointerup", "pointercancel"]) $("pose").addEventListener(name, () => (page.last = null));
$("pose").addEventListener("keydown", key);
$("ar").addEventListener("click", () => (page.ar ? page.ar.end() : startAr()));
document.addEventListener("dragover", (event) => event.preventDefault());
document.addEventListener("drop", (event) => {
  event.preventDefault();
  upload(event.dataTransfer.files[0]);
});
navigator.xr?.addEventListener?.("devicechange", offerAr);
offerAr();
setInterval(measure, 500);
requestAnimationFrame(loop);
