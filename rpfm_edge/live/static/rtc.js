// Frames as a WebRTC video track. The number of a frame is a strip of 16 light and dark cells below the picture; its
// header comes by the WebSocket, sooner or later than the picture, and a picture without one is not shown.

import { now } from "./link.js";

const STRIP_ROWS = 16, STRIP_BITS = 16;
const KEPT = 128; // headers and pictures that wait for each other
const GATHER_MS = 2000;

const PROCESSOR = "MediaStreamTrackProcessor" in window; // it goes on in AR, where some headsets stop the video element

export const hasVideo =
  "RTCPeerConnection" in window && (PROCESSOR || "requestVideoFrameCallback" in HTMLVideoElement.prototype);

export class Video {
  /** `send(message)` speaks to the server; `frame({header, bitmap, received})` takes what is to be shown. */
  constructor(send, frame) {
    Object.assign(this, { send, frame, connection: null, headers: new Map(), pictures: new Map() });
    this.cells = new OffscreenCanvas(STRIP_BITS, 1).getContext("2d", { willReadFrequently: true });
    this.cells.imageSmoothingEnabled = false;
  }

  /** Offer to receive video; the server's answer goes to `answered`. */
  async open() {
    const connection = new RTCPeerConnection();
    this.connection = connection;
    const transceiver = connection.addTransceiver("video", { direction: "recvonly" });
    const known = RTCRtpReceiver.getCapabilities("video").codecs;
    transceiver.setCodecPreferences(known.filter(({ mimeType }) => /H264|VP8|rtx/i.test(mimeType)));
    const { receiver } = transceiver;
    if ("jitterBufferTarget" in receiver) receiver.jitterBufferTarget = 0; // the latest frame, not the smoothest
    await connection.setLocalDescription();
    await gathered(connection);
    if (this.connection !== connection) return;
    this.send({ type: "video", sdp: connection.localDescription.sdp });
    for await (const picture of PROCESSOR ? processed(receiver.track) : played(receiver.track)) {
      if (this.connection !== connection) return picture.close();
      await this.take(picture);
    }
  }

  async answered(sdp) {
    if (sdp === null || !this.connection) return;
    await this.connection.setRemoteDescription({ type: "answer", sdp });
  }

  close() {
    if (!this.connection) return;
    this.connection.close();
    this.connection = null;
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

  show(number, header, { bitmap, received }) {
    this.headers.delete(number);
    this.pictures.delete(number);
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
  if (map.size <= KEPT) return;
  const [oldest, { bitmap }] = map.entries().next().value;
  bitmap?.close();
  map.delete(oldest);
}

/** All candidates of a connection, or those that were found in time. */
function gathered(connection) {
  if (connection.iceGatheringState === "complete") return Promise.resolve();
  return new Promise((done) => {
    connection.addEventListener("icegatheringstatechange", () => connection.iceGatheringState === "complete" && done());
    setTimeout(done, GATHER_MS);
  });
}
