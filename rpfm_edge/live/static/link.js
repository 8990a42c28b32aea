// The connection: poses out, frames in, clocks compared. Nothing here waits for anything: the latest frame wins.
// Messages are those of docs/live_protocol.md, version 1.

const VERSION = 1;
const PING_MS = 1000;
const IN_FLIGHT = 60; // unanswered poses, a second of them: the server takes the latest, so more often is fresher
const STALLED_MS = 500; // beyond that one pose goes out in so long, to find out whether there is somebody
const SENT_KEPT = 512; // poses whose time of sending is remembered
const FLEETING = ["pose", "shown"];
const FINAL = {
  4401: "This page has no valid token. Open the address, or the code, that the server shows when it starts.",
  4403: "The server refuses pages from this address. Open the page at the server's own address.",
};

export const now = () => performance.timeOrigin + performance.now();

export class Link {
  /** `on` holds the callbacks hello, state, person, error, open(bool, why) and frame(frame). */
  constructor(on) {
    this.on = on;
    this.id = this.answered = 0;
    this.sent = new Map();
    this.pings = [];
    this.offset = null; // server's clock minus ours, ms
    this.delay = 250;
    this.skipped = 0; // frames that came while another was being decoded or waited to be shown
    this.options = {};
    this.channel = null; // a data channel, which takes what need not be sent again if it is lost
    this.connect();
    setInterval(() => this.send({ type: "ping", t_ms: now() }), PING_MS);
  }

  connect() {
    const address = new URL("ws", location.href);
    address.protocol = location.protocol === "https:" ? "wss:" : "ws:";
    address.search = location.search; // ?token=…, when the page itself was opened with one
    const socket = new WebSocket(address);
    this.socket = socket;
    socket.binaryType = "arraybuffer";
    socket.onopen = () => this.opened();
    socket.onmessage = ({ data }) => (typeof data === "string" ? this.text(JSON.parse(data)) : this.binary(data));
    socket.onclose = ({ code }) => this.closed(code);
  }

  opened() {
    this.pings = [];
    this.answered = this.id;
    this.send({ type: "ping", t_ms: now() });
    if (Object.keys(this.options).length) this.send({ type: "options", ...this.options });
    this.on.open(true);
  }

  closed(code) {
    this.on.open(false, FINAL[code] ?? (code === 4429 ? "The server has as many clients as it takes." : null));
    if (code in FINAL) return;
    setTimeout(() => this.connect(), this.delay);
    this.delay = Math.min(this.delay * 2, 5000);
  }

  text(message) {
    if (message.type === "hello") this.delay = 250; // only now are we in: a full server opens, then closes
    if (message.type !== "pong") return this.on[message.type]?.(message);
    const received = now();
    const ping = { trip: received - message.t_ms, at: (received + message.t_ms) / 2, message };
    this.pings = [...this.pings.slice(-9), ping];
    const best = this.pings.reduce((a, b) => (b.trip < a.trip ? b : a)); // the least delayed tells best
    this.offset = best.message.server_ms - best.at;
  }

  binary(buffer) {
    const received = now();
    const length = new DataView(buffer).getUint32(0);
    const header = JSON.parse(new TextDecoder().decode(new Uint8Array(buffer, 4, length)));
    if (this.waiting) this.skipped += 1;
    this.waiting = { header, received, sent: this.sentAt(header), jpeg: new Uint8Array(buffer, 4 + length) };
    this.decode();
  }

  /** When the pose of a frame was sent, if it is our own: frames of others' poses carry them. */
  sentAt(header) {
    if (header.pose) return undefined;
    this.answered = Math.max(this.answered, header.id);
    return this.sent.get(header.id);
  }

  async decode() {
    if (this.decoding) return;
    this.decoding = true;
    while (this.waiting) {
      const { jpeg, ...frame } = this.waiting;
      this.waiting = null;
      try {
        const bitmap = await createImageBitmap(new Blob([jpeg], { type: "image/jpeg" }));
        this.on.frame({ ...frame, bitmap });
      } catch {
        this.on.error({ message: `Frame ${frame.header.id} could not be decoded.` });
      }
    }
    this.decoding = false;
  }

  /** Whether what was sent has left, and what was answered is not long ago. */
  ready() {
    if (this.socket.readyState !== WebSocket.OPEN || this.way("pose").bufferedAmount > 0) return false;
    return this.id - this.answered < IN_FLIGHT || now() - this.sent.get(this.id) > STALLED_MS;
  }

  pose(keypoints, size) {
    this.id += 1;
    this.sent.set(this.id, now());
    this.sent.delete(this.id - SENT_KEPT);
    const rounded = keypoints.map((point) => point && point.map((value) => Math.round(value * 10) / 10));
    const stamps = { id: this.id, t_ms: this.sent.get(this.id) };
    this.send({ type: "pose", ...stamps, format: "openpose18", keypoints: rounded, size });
  }

  /** Tell the server when a frame was on screen, `shown` in ms of our clock. */
  shown({ header, received }, shown) {
    const offset = this.offset === null ? {} : { offset_ms: this.offset };
    this.send({ type: "shown", id: header.id, frame: header.frame, t_ms: shown, received_ms: received, ...offset });
  }

  /** Set options now, and again after every reconnection if `keep`: those of the whole service are said once. */
  setOptions(options, keep = false) {
    if (keep) Object.assign(this.options, options);
    this.send({ type: "options", ...options });
  }

  way(type) {
    return FLEETING.includes(type) && this.channel?.readyState === "open" ? this.channel : this.socket;
  }

  send(message) {
    if (this.socket.readyState !== WebSocket.OPEN) return;
    this.way(message.type).send(JSON.stringify({ v: VERSION, ...message }));
  }
}
