// Frames as a WebRTC video track. The number of a frame is a strip of 16 light and dark cells below the picture; its
// header comes by a data channel, sooner or later than the picture, and a picture without one is not shown.

import { now } from "./link.js";

const STRIP_ROWS = 16, STRIP_BITS = 16;
const KEPT = 128; // headers and pictures that wait for each other
const GATHER_MS = 2000, CONNECT_MS = 10000, BROKEN_MS = 2000;

const PROCESSOR = "MediaStreamTrackProcessor" in window; // it goes on in AR, where some headsets stop the video element

export const hasVideo =
  "RTCPeerConnection" in window && "OffscreenCanvas" in window &&
  (PROCESSOR || "requestVideoFrameCallback" in HTMLVideoElement.prototype);

export class Video {
  /** `send(message)` speaks to the server; `frame({header, bitmap, received})` takes what is to be shown; `lost(error)`. */
  constructor(send, frame, lost) {
    Object.assign(this, { send, frame, lost, offer: 0, connection: null, channel: null });
    Object.assign(this, { headers: new Map(), pictures: new Map() });
  }

  /** Offer to receive video; the server's answer goes to `answered`. */
  async open() {
    const connection = new RTCPeerConnection();
    this.connection = connection;
    this.channel = connection.createDataChannel("frames", { ordered: false, maxRetransmits: 0 });
    this.channel.onmessage = ({ data }) => this.told(JSON.parse(data));
    this.cells = new OffscreenCanvas(STRIP_BITS, 1).getContext("2d", { willReadFrequently: true });
    this.cells.imageSmoothingEnabled = false;
    const transceiver = connection.addTransceiver("video", { direction: "recvonly" });
    const known = RTCRtpReceiver.getCapabilities("video").codecs;
    transceiver.setCodecPreferences(known.filter(({ mimeType }) => /H264|VP8|rtx/i.test(mimeType)));
    const { receiver } = transceiver;
    if ("jitterBufferTarget" in receiver) receiver.jitterBufferTarget = 0; // the latest frame, not the smoothest
    await connection.setLocalDescription();
    await gathered(connection);
    if (this.connection !== connection) return;
    this.offer += 1;
    this.send({ type: "video", id: this.offer, sdp: connection.localDescription.sdp });
    this.guard(connection);
    for await (const picture of PROCESSOR ? processed(receiver.track) : played(receiver.track)) {
      if (this.connection !== connection) return picture.close();
      await this.take(picture);
    }
  }

  async answered({ id, sdp }) {
    if (id !== this.offer || !this.connection) return; // the answer to an offer that was given up
    if (sdp === null) throw new Error("the server did not take the offer");
    await this.connection.setRemoteDescription({ type: "answer", sdp });
  }

  /** Give up a connection that does not come to stand, or that has broken. */
  guard(connection) {
    const after = (ms, bad, why) =>
      setTimeout(() => this.connection === connection && bad() && this.lost(new Error(why)), ms);
    const state = () => connection.connectionState;
    after(CONNECT_MS, () => state() !== "connected", "no connection to the server by UDP");
    connection.onconnectionstatechange = () => {
      if (state() === "failed") after(0, () => true, "the connection failed");
      if (state() === "disconnected") after(BROKEN_MS, () => state() !== "connected", "the connection broke");
    };
  }

  close() {
    if (!this.connection) return;
    this.connection.close();
    this.connection = this.channel = null;
    for (const { bitmap } of this.pictures.values()) bitmap.close();
    this.headers.clear();
    this.pictures.clear();
  }

  /** The header of a frame that has left the server. */
  told(header) {
    const number = header.frame % 2 ** STRIP_BITS;
    const picture = this.pictures.get(number);
    if (picture) this.show(number, header, picture);
    else keep(this.headers, number, header);
  }

  async take({ source, width, height, received, close }) {
    const number = this.number(source, width, height);
    const bitmap = await createImageBitmap(source, 0, 0, width, height - STRIP_ROWS);
    close();
    const header = this.headers.get(number);
    if (header) this.show(number, header, { bitmap, received });
    else keep(this.pictures, number, { bitmap, received });
  }

  /** The number below a picture. */
  number(source, width, height) {
    this.cells.drawImage(source, 0, height - STRIP_ROWS, width, STRIP_ROWS, 0, 0, STRIP_BITS, 1);
    const { data } = this.cells.getImageData(0, 0, STRIP_BITS, 1);
    return Array.from({ length: STRIP_BITS }, (_, i) => data[4 * i + 1] > 127).reduce((sum, bit) => 2 * sum + bit, 0);
  }

  /** Show a picture; what waited longer on either side has lost its other half. */
  show(number, header, { bitmap, received }) {
    for (const map of [this.headers, this.pictures]) {
      if (map.has(number)) forgetUntil(map, number);
    }
    this.frame({ header, bitmap, received });
  }
}

/** The pictures of a track as they are decoded. */
async function* processed(track) {
  const reader = new MediaStreamTrackProcessor({ track }).readable.getReader();
  for (let next = await reader.read(); !next.done; next = await reader.read()) {
    const { value: source } = next;
    const { displayWidth: width, displayHeight: height } = source;
    yield { source, width, height, received: now(), close: () => source.close() };
  }
}

/** The pictures of a track as a video element presents them. */
async function* played(track) {
  const source = Object.assign(document.createElement("video"), { muted: true, playsInline: true, autoplay: true });
  source.srcObject = new MediaStream([track]);
  source.play().catch(() => {}); // it begins with the first picture
  while (track.readyState === "live") {
    const [at, { width, height, receiveTime }] = await new Promise((done) =>
      source.requestVideoFrameCallback((...presented) => done(presented)));
    yield { source, width, height, received: performance.timeOrigin + (receiveTime ?? at), close: () => {} };
  }
}

function keep(map, number, value) {
  map.set(number, value);
  if (map.size > KEPT) forgetUntil(map, map.keys().next().value);
}

/** Drop what came before `number`, and `number` itself, whose bitmap is in use or goes with it. */
function forgetUntil(map, number) {
  for (const [key, { bitmap }] of map) {
    map.delete(key);
    if (key === number) return;
    bitmap?.close();
  }
}

/** All candidates of a connection, or those that were found in time. */
function gathered(connection) {
  if (connection.iceGatheringState === "complete") return Promise.resolve();
  return new Promise((done) => {
    connection.addEventListener("icegatheringstatechange", () => connection.iceGatheringState === "complete" && done());
    setTimeout(done, GATHER_MS);
  });
}
