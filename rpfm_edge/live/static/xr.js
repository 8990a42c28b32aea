// The person as a life-size billboard in an immersive-ar session: a textured quad, transparent where its matte is dark.

const HEIGHT_M = 1.7;
const AHEAD_M = 2;
const EYES_M = 1.6; // where the floor is assumed below the eyes, if the device does not know it

const VERTEX = `
attribute vec2 corner;
uniform mat4 projection, view;
uniform vec3 foot;
uniform vec2 size;
uniform float yaw;
varying vec2 uv;
void main() {
  vec2 flat_ = vec2(corner.x - 0.5, corner.y) * size;
  vec3 place = foot + vec3(cos(yaw) * flat_.x, flat_.y, -sin(yaw) * flat_.x);
  uv = vec2(corner.x, 1.0 - corner.y);
  gl_Position = projection * view * vec4(place, 1.0);
}`;
// Picture above, matte below: half a row is kept from the seam, so that neither bleeds into the other. The matte is the
// least of a pixel and its neighbours, because the outermost ones hold much of the background's colour. Its few lowest
// and highest levels are JPEG's noise.
const FRAGMENT = `
precision mediump float;
uniform sampler2D frame;
uniform vec2 pixels;
uniform float stacked;
varying vec2 uv;
float matte(vec2 step_) {
  float seam = 0.5 / pixels.y;
  vec2 at = vec2(uv.x, 0.5 + 0.5 * uv.y) + step_ / pixels;
  return texture2D(frame, vec2(at.x, clamp(at.y, 0.5 + seam, 1.0 - seam))).g;
}
void main() {
  float seam = 0.5 / pixels.y;
  float y = stacked > 0.5 ? clamp(0.5 * uv.y, seam, 0.5 - seam) : uv.y;
  vec3 colour = texture2D(frame, vec2(uv.x, y)).rgb;
  float beside = min(matte(vec2(1, 0)), matte(vec2(-1, 0)));
  float least = min(min(matte(vec2(0)), beside), min(matte(vec2(0, 1)), matte(vec2(0, -1))));
  float alpha = stacked > 0.5 ? clamp((least - 0.04) / 0.92, 0.0, 1.0) : 1.0;
  gl_FragColor = vec4(colour * alpha, alpha);
}`;

/** null if this browser can show AR here, otherwise a sentence that says why not. */
export async function whyNoAr() {
  if (!window.isSecureContext) return "AR needs a secure connection: open this page by https, with a certificate.";
  if (!navigator.xr) return "This browser has no WebXR. Open this page in a headset, or in Chrome on an AR phone.";
  const works = await navigator.xr.isSessionSupported("immersive-ar").catch(() => false);
  return works ? null : "This device has no AR display.";
}

/**
 * Start a session; must be called from a click.
 *
 * `newest()` gives {bitmap, stacked, id} or null, `tick(now)` is called before each frame of the display, in place of
 * window.requestAnimationFrame, which some headsets stop; `ended()` after the session.
 */
export async function enterAr({ newest, tick, ended }) {
  const session = await navigator.xr.requestSession("immersive-ar", { optionalFeatures: ["local-floor"] });
  try {
    const canvas = document.createElement("canvas");
    const gl = canvas.getContext("webgl", { xrCompatible: true, alpha: true });
    await session.updateRenderState({ baseLayer: new XRWebGLLayer(session, gl, { alpha: true }) });
    const { space, floor } = await ground(session);
    const scene = { gl, uniform: prepare(gl), foot: null, yaw: 0, drawn: null, aspect: 1 };
    session.addEventListener("select", () => (scene.foot = null)); // come to where the viewer looks
    session.addEventListener("end", ended);
    const loop = (now, frame) => {
      session.requestAnimationFrame(loop);
      tick(now);
      const viewer = frame.getViewerPose(space);
      if (viewer) render(scene, session.renderState.baseLayer, viewer, newest(), floor);
    };
    session.requestAnimationFrame(loop);
    return session;
  } catch (error) {
    await session.end().catch(() => {});
    throw error;
  }
}

async function ground(session) {
  try {
    return { space: await session.requestReferenceSpace("local-floor"), floor: 0 };
  } catch {
    return { space: await session.requestReferenceSpace("local"), floor: -EYES_M };
  }
}

function prepare(gl) {
  const program = gl.createProgram();
  for (const [type, text] of [[gl.VERTEX_SHADER, VERTEX], [gl.FRAGMENT_SHADER, FRAGMENT]]) {
    const shader = gl.createShader(type);
    gl.shaderSource(shader, text);
    gl.compileShader(shader);
    gl.attachShader(program, shader);
  }
  gl.bindAttribLocation(program, 0, "corner");
  gl.linkProgram(program);
  if (!gl.getProgramParameter(program, gl.LINK_STATUS)) throw new Error(gl.getProgramInfoLog(program));
  gl.useProgram(program);
  gl.bindBuffer(gl.ARRAY_BUFFER, gl.createBuffer());
  gl.bufferData(gl.ARRAY_BUFFER, new Float32Array([0, 0, 1, 0, 0, 1, 1, 1]), gl.STATIC_DRAW);
  gl.enableVertexAttribArray(0);
  gl.vertexAttribPointer(0, 2, gl.FLOAT, false, 0, 0);
  gl.bindTexture(gl.TEXTURE_2D, gl.createTexture());
  for (const [name, value] of [
    [gl.TEXTURE_WRAP_S, gl.CLAMP_TO_EDGE], [gl.TEXTURE_WRAP_T, gl.CLAMP_TO_EDGE],
    [gl.TEXTURE_MIN_FILTER, gl.LINEAR], [gl.TEXTURE_MAG_FILTER, gl.LINEAR],
  ]) gl.texParameteri(gl.TEXTURE_2D, name, value);
  gl.enable(gl.BLEND);
  gl.blendFunc(gl.ONE, gl.ONE_MINUS_SRC_ALPHA); // colours come multiplied by alpha
  gl.clearColor(0, 0, 0, 0);
  const uniforms = {};
  return (name) => (uniforms[name] ??= gl.getUniformLocation(program, name));
}

function render(scene, layer, viewer, newest, floor) {
  const { gl, uniform } = scene;
  gl.bindFramebuffer(gl.FRAMEBUFFER, layer.framebuffer);
  gl.clear(gl.COLOR_BUFFER_BIT | gl.DEPTH_BUFFER_BIT);
  if (newest) upload(scene, newest);
  if (!scene.drawn) return;
  place(scene, viewer.transform, floor);
  gl.uniform3fv(uniform("foot"), scene.foot);
  gl.uniform1f(uniform("yaw"), scene.yaw);
  gl.uniform2f(uniform("size"), HEIGHT_M * scene.aspect, HEIGHT_M);
  for (const eye of viewer.views) {
    const { x, y, width, height } = layer.getViewport(eye);
    gl.viewport(x, y, width, height);
    gl.uniformMatrix4fv(uniform("projection"), false, eye.projectionMatrix);
    gl.uniformMatrix4fv(uniform("view"), false, eye.transform.inverse.matrix);
    gl.drawArrays(gl.TRIANGLE_STRIP, 0, 4);
  }
}

function upload(scene, { bitmap, stacked }) {
  const { gl, uniform } = scene;
  if (scene.drawn === bitmap) return;
  gl.texImage2D(gl.TEXTURE_2D, 0, gl.RGBA, gl.RGBA, gl.UNSIGNED_BYTE, bitmap);
  gl.uniform1f(uniform("stacked"), stacked ? 1 : 0);
  gl.uniform2f(uniform("pixels"), bitmap.width, bitmap.height);
  scene.aspect = bitmap.width / (stacked ? bitmap.height / 2 : bitmap.height);
  scene.drawn = bitmap;
}

/** Put the feet on the floor ahead of the viewer, once; turn the billboard to the viewer, about its upright axis. */
function place(scene, { position, matrix }, floor) {
  if (!scene.foot) {
    const [x, z] = [-matrix[8], -matrix[10]]; // where the viewer looks, on the floor
    const length = Math.hypot(x, z) || 1;
    scene.foot = [position.x + (AHEAD_M * x) / length, floor, position.z + (AHEAD_M * z) / length];
  }
  scene.yaw = Math.atan2(position.x - scene.foot[0], position.z - scene.foot[2]);
}
