// Poses: 18 OpenPose keypoints [x, y] in pixels of the picture, null where missing.

export const NAMES = [
  "nose", "neck", "right shoulder", "right elbow", "right wrist", "left shoulder", "left elbow", "left wrist",
  "right hip", "right knee", "right ankle", "left hip", "left knee", "left ankle",
  "right eye", "left eye", "right ear", "left ear",
];
const BONES = [
  [1, 2], [1, 5], [2, 3], [3, 4], [5, 6], [6, 7], [1, 8], [8, 9], [9, 10],
  [1, 11], [11, 12], [12, 13], [1, 0], [0, 14], [14, 16], [0, 15], [15, 17],
];
// What moves along when a joint is dragged.
const CHILDREN = {
  0: [14, 15, 16, 17], 1: [0, 2, 5, 8, 11], 2: [3], 3: [4], 5: [6], 6: [7], 8: [9], 9: [10], 11: [12], 12: [13],
};
const hue = (i) => `hsl(${(i * 360) / 18}deg 90% 60%)`;

/** The animated figure at `seconds`, for a picture of [height, width]: it sways, waves and marks time. */
export function animated(seconds, [height, width]) {
  const unit = Math.min(height / 256, width / 176); // the figure is laid out for 256 × 176
  const left = (width - 176 * unit) / 2, top = (height - 256 * unit) / 2;
  const wave = (period, phase = 0) => Math.sin((2 * Math.PI * seconds) / period + phase);
  const sway = 5 * wave(3.2);
  const limb = ([x, y], angle, length) => [x + length * Math.sin(angle), y + length * Math.cos(angle)];
  const neck = [88 + sway, 56 + wave(1.6)];
  const turn = 3 * wave(4.1);
  const head = (x, y) => [neck[0] + x + turn, neck[1] + y];
  const shoulders = [[neck[0] - 20, neck[1] + 1], [neck[0] + 20, neck[1] + 1]];
  const hips = [[76 + sway / 2, 122], [100 + sway / 2, 122]];
  const raise = 0.5 + 0.5 * wave(6); // the right arm: down … up
  const elbows = [limb(shoulders[0], -0.45 - 1.25 * raise, 31), limb(shoulders[1], 0.5 + 0.25 * wave(2.7), 31)];
  const wrists = [
    limb(elbows[0], -0.3 - raise * (2.6 + 0.45 * wave(0.9)), 27), limb(elbows[1], 0.1 + 0.5 * wave(2.7, 1), 27),
  ];
  const knees = [limb(hips[0], -0.2 + 0.07 * wave(1.6), 50), limb(hips[1], 0.2 + 0.07 * wave(1.6), 50)];
  const step = 4 * wave(1.6); // a foot is lifted
  const ankles = [limb(knees[0], -0.14, 45 - Math.max(0, step)), limb(knees[1], 0.14, 45 + Math.min(0, step))];
  const points = [
    head(0.5, -26), neck, shoulders[0], elbows[0], wrists[0], shoulders[1], elbows[1], wrists[1],
    hips[0], knees[0], ankles[0], hips[1], knees[1], ankles[1],
    head(-3, -30), head(4, -30), head(-10, -26), head(9, -26),
  ];
  return points.map(([x, y]) => [left + x * unit, top + y * unit]);
}

/** Draw a pose of a picture of [height, width] so that it fills `canvas`; `chosen` is the index of a marked joint. */
export function draw(canvas, pose, [height, width], chosen = -1) {
  const context = canvas.getContext("2d");
  context.setTransform(1, 0, 0, 1, 0, 0);
  context.clearRect(0, 0, canvas.width, canvas.height);
  if (!pose) return;
  context.setTransform(canvas.width / width, 0, 0, canvas.height / height, 0, 0);
  const unit = height / 256;
  context.lineCap = "round";
  context.lineWidth = 5 * unit;
  context.globalAlpha = 0.65;
  BONES.forEach(([from, to], i) => {
    if (!pose[from] || !pose[to]) return;
    context.strokeStyle = hue(i);
    context.beginPath();
    context.moveTo(...pose[from]);
    context.lineTo(...pose[to]);
    context.stroke();
  });
  context.globalAlpha = 1;
  pose.forEach((point, i) => point && disc(context, point, 3.6 * unit, hue(i)));
  if (pose[chosen]) ring(context, pose[chosen], 7 * unit);
}

function disc(context, [x, y], radius, colour) {
  context.fillStyle = colour;
  context.beginPath();
  context.arc(x, y, radius, 0, 2 * Math.PI);
  context.fill();
}

function ring(context, [x, y], radius) {
  context.strokeStyle = "#fff";
  context.lineWidth = radius / 4;
  context.beginPath();
  context.arc(x, y, radius, 0, 2 * Math.PI);
  context.stroke();
}

/** The index of the joint nearest to [x, y], -1 if none lies within `reach` pixels. */
export function nearest(pose, [x, y], reach) {
  let best = -1, least = reach;
  pose.forEach((point, i) => {
    const distance = point ? Math.hypot(point[0] - x, point[1] - y) : Infinity;
    if (distance < least) [best, least] = [i, distance];
  });
  return best;
}

/** `pose` with a joint and all that hangs on it moved by [dx, dy]; nothing leaves the picture of [height, width]. */
export function moved(pose, joint, [dx, dy], [height, width]) {
  const next = pose.slice();
  const move = (i) => {
    if (next[i]) next[i] = [clamp(next[i][0] + dx, width - 1), clamp(next[i][1] + dy, height - 1)];
    (CHILDREN[i] ?? []).forEach(move);
  };
  move(joint);
  return next;
}

const clamp = (value, most) => Math.min(Math.max(value, 0), most);
