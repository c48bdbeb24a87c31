// SPDX-License-Identifier: Apache-2.0
// Plays a localization: a scene in 3-D (three.js), the image of a frame with the map's points over it, two sliders.
// Data: see page.py. A pose is the upper three rows of T_map_camera; cameras look along z, y is down.

const PAGE = document.documentElement.outerHTML;
const data = JSON.parse(document.getElementById("data").textContent);
const cameraOf = (f) => f.camera || data.camera; // width, height, fx, fy, cx, cy, and k1, k2, p1, p2 if the lens distorts
const COLOURS = { coarse: 0xef6c00, pose: 0x35a7ff, truth: 0x9aa5b1, used: 0xffc400, references: 0x56616d, way: 0x35a7ff };
const el = (id) => document.getElementById(id);
const up = new THREE.Vector3(...data.up);

const bytes = (text) => Uint8Array.from(atob(text), (c) => c.charCodeAt(0));

/** Points as a Float32Array, from 16-bit integers between two corners. */
function unpack(cloud) {
  if (cloud.xyz) return Float32Array.from(cloud.xyz.flat());
  const steps = new Uint16Array(bytes(cloud.points).buffer);
  const points = new Float32Array(steps.length);
  for (let i = 0; i < steps.length; i++) points[i] = cloud.low[i % 3] + (cloud.size[i % 3] * steps[i]) / 65535;
  return points;
}

/** Turbo-like colour of a share from 0 (blue) to 1 (red), as CSS. */
const STOPS = [[48, 18, 59], [70, 107, 227], [40, 187, 236], [49, 242, 153], [162, 252, 60], [237, 208, 58], [251, 128, 34],
  [210, 49, 5], [122, 4, 3]];
function shade(share) {
  const at = Math.min(Math.max(share, 0), 1) * (STOPS.length - 1), k = Math.min(Math.floor(at), STOPS.length - 2);
  return `rgb(${STOPS[k].map((c, i) => Math.round(c + (STOPS[k + 1][i] - c) * (at - k))).join(",")})`;
}

// ---- the scene

THREE.ColorManagement.enabled = false; // colours are shown as they are

const renderer = new THREE.WebGLRenderer({ antialias: true, preserveDrawingBuffer: true });
renderer.setPixelRatio(Math.min(devicePixelRatio, 2));
el("scene").prepend(renderer.domElement);
renderer.outputColorSpace = "srgb-linear";
const scene = new THREE.Scene();
scene.background = new THREE.Color(0x14181d);
const eye = new THREE.PerspectiveCamera(55, 1, 0.02, 2000);
eye.up.copy(up);
const orbit = new THREE.OrbitControls(eye, renderer.domElement);

function cloudOf(cloud, size) {
  const geometry = new THREE.BufferGeometry();
  geometry.setAttribute("position", new THREE.BufferAttribute(unpack(cloud), 3));
  geometry.setAttribute("color", new THREE.BufferAttribute(typeof cloud.colours === "string" ? bytes(cloud.colours) : Uint8Array.from(cloud.colours.flat()), 3, true));
  return new THREE.Points(geometry, new THREE.PointsMaterial({ size, vertexColors: true, sizeAttenuation: true }));
}

function linesOf(positions, colour, opacity = 1) {
  const geometry = new THREE.BufferGeometry();
  geometry.setAttribute("position", new THREE.BufferAttribute(new Float32Array(positions), 3));
  return new THREE.LineSegments(geometry, new THREE.LineBasicMaterial({ color: colour, transparent: opacity < 1, opacity }));
}

const toMap = (pose, p) => [0, 1, 2].map((r) => pose[4 * r] * p[0] + pose[4 * r + 1] * p[1] + pose[4 * r + 2] * p[2] + pose[4 * r + 3]);

/** Line ends of a camera symbol: a pyramid from the centre to the image plane. */
function frustum(pose, depth, camera = data.camera) {
  const [WIDTH, HEIGHT, FX, FY, CX, CY] = camera;
  const corner = (u, v) => toMap(pose, [((u - CX) / FX) * depth, ((v - CY) / FY) * depth, depth]);
  const c = [corner(0, 0), corner(WIDTH, 0), corner(WIDTH, HEIGHT), corner(0, HEIGHT)], o = toMap(pose, [0, 0, 0]);
  const ends = [];
  for (let k = 0; k < 4; k++) ends.push(...o, ...c[k], ...c[k], ...c[(k + 1) % 4]);
  return ends;
}

const extent = new THREE.Vector3(...data.map.size), middle = new THREE.Vector3(...data.map.low).addScaledVector(extent, 0.5);
const size = Math.max(extent.length(), 0.5);
let symbol = 0.022 * size;

/** Floor grid below the map with cells of a round length, and the axes of the map frame. */
const cell = [0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50].find((step) => size / step < 20) || 100;
const axis = data.up.findIndex((v) => v !== 0), flat = [0, 1, 2].filter((k) => k !== axis);
const heights = [data.map.low[axis], data.map.low[axis] + data.map.size[axis]].map((v) => v * data.up[axis]).sort((a, b) => a - b);
function grid() {
  const ends = [], low = [], high = [];
  for (const k of flat) {
    low[k] = Math.floor(data.map.low[k] / cell) * cell;
    high[k] = Math.ceil((data.map.low[k] + data.map.size[k]) / cell) * cell;
  }
  for (const [k, other] of [flat, [...flat].reverse()]) {
    for (let v = low[k]; v <= high[k] + cell / 2; v += cell) {
      for (const end of [low[other], high[other]]) {
        const point = [0, 0, 0];
        point[axis] = heights[0] * data.up[axis];
        point[k] = v;
        point[other] = end;
        ends.push(...point);
      }
    }
  }
  return linesOf(ends, 0x3a4652, 0.8);
}
const axes = [[cell, 0, 0], [0, cell, 0], [0, 0, cell]].map((end, k) => linesOf([0, 0, 0, ...end], [0xe53935, 0x43a047, 0x1e88e5][k]));

const layers = {
  grid: { text: `floor grid, ${cell} m`, colour: "#3a4652", objects: [grid()] },
  axes: { text: `map frame, ${cell} m: x red, y green, z blue`, colour: "#e53935", objects: axes },
  scene: { text: "points of the frames", colour: "#c9a27a", objects: [cloudOf(data.scene, 0.004 * size)] },
  map: { text: `map points, by height (${heights.map((v) => v.toFixed(1)).join(" to ")} m)`, colour: "#2fb47c", objects: [cloudOf(data.map, 0.002 * size)] },
  references: { text: "reference views", colour: "#56616d",
    objects: [linesOf(data.references.flatMap((pose) => frustum(pose, 0.5 * symbol)), COLOURS.references, 0.6)] },
  used: { text: "reference views used", colour: "#ffc400", objects: [] },
  truth: { text: "the source's pose", colour: "#9aa5b1", objects: [] },
  coarse: { text: "coarse pose", colour: "#ef6c00", objects: [] },
  pose: { text: "pose at this step, path of the camera", colour: "#35a7ff", objects: [] },
};
for (const [name, layer] of Object.entries(layers)) {
  layer.group = new THREE.Group();
  layer.objects.forEach((object) => layer.group.add(object));
  scene.add(layer.group);
  const label = document.createElement("label"), box = document.createElement("input"), swatch = document.createElement("span");
  box.type = "checkbox";
  box.checked = true;
  box.onchange = () => { layer.group.visible = box.checked; draw(); };
  swatch.className = "swatch";
  swatch.style.background = layer.colour;
  label.append(box, swatch, layer.text);
  el("legend").append(label);
}

function refill(name, objects) {
  const group = layers[name].group;
  for (const object of [...group.children]) { group.remove(object); object.geometry.dispose(); object.material.dispose(); }
  objects.forEach((object) => group.add(object));
}

// ---- state

let frameNumber = 0, stepNumber = 0, follows = false, timer = null;
const pictures = new Map();
const points = new Map();
const frame = () => data.frames[frameNumber];
const stepOf = (f, k) => f.steps[Math.min(k, f.steps.length - 1)];
const strides = [...new Set(data.frames.flatMap((f) => f.steps.map((s) => s.stride)))].sort((a, b) => b - a);
const STRIDE_COLOURS = ["#35a7ff", "#ef9c3c", "#66bb6a", "#ba68c8", "#ffee58", "#ef5350"];
const strideColour = (stride) => STRIDE_COLOURS[strides.indexOf(stride) % STRIDE_COLOURS.length];
const poseNow = () => (frame().steps.length ? stepOf(frame(), stepNumber).pose : frame().pose || frame().coarse);

function referencePoints(view) {
  if (!points.has(view)) points.set(view, unpack(data.points[view]));
  return points.get(view);
}

function pictureOf(f) {
  if (!pictures.has(f)) {
    const image = new Image();
    image.src = f.image.startsWith("data:") ? f.image : "data:image/jpeg;base64," + f.image;
    pictures.set(f, image.decode().then(() => image));
  }
  return pictures.get(f);
}

/** Where the points of the frame's reference views are seen from a pose, with their residuals at a step. */
function* projected(f, step) {
  const [WIDTH, HEIGHT, FX, FY, CX, CY, k1 = 0, k2 = 0, p1 = 0, p2 = 0] = cameraOf(f);
  if (f.points2d) {
    for (const [x, y] of f.points2d[Math.min(step, f.points2d.length - 1)] || []) yield [x * WIDTH, y * HEIGHT, 0.4];
    return;
  }
  const pose = stepOf(f, step).pose, residuals = bytes(f.residuals[Math.min(step, f.residuals.length - 1)]);
  let k = 0;
  for (const view of f.references) {
    const p = referencePoints(view);
    for (let i = 0; i < p.length; i += 3, k++) {
      if (residuals[k] === 255) continue;
      const d = [p[i] - pose[3], p[i + 1] - pose[7], p[i + 2] - pose[11]];
      const [x, y, z] = [0, 1, 2].map((c) => pose[c] * d[0] + pose[4 + c] * d[1] + pose[8 + c] * d[2]);
      if (z <= 0.05) continue;
      const [a, b] = [x / z, y / z], r2 = a * a + b * b, radial = 1 + k1 * r2 + k2 * r2 * r2;
      const u = a * radial + 2 * p1 * a * b + p2 * (r2 + 2 * a * a), v = b * radial + 2 * p2 * a * b + p1 * (r2 + 2 * b * b);
      yield [FX * u + CX, FY * v + CY, residuals[k] / data.residual_steps];
    }
  }
}

async function paint(canvas, text, f, step, name) {
  if (!f.image) { text.textContent = "no image"; return; }
  const image = await pictureOf(f);
  if (f !== frame()) return;
  canvas.width = image.naturalWidth;
  canvas.height = image.naturalHeight;
  const context = canvas.getContext("2d"), scale = image.naturalWidth / cameraOf(f)[0];
  context.drawImage(image, 0, 0);
  if (!f.steps.length) { text.textContent = f.reason || "not aligned"; return; }
  context.fillStyle = "rgba(20,24,29,0.3)";
  context.fillRect(0, 0, canvas.width, canvas.height);
  const drawn = [...projected(f, step)].sort((a, b) => a[2] - b[2]);
  for (const [u, v, residual] of drawn) {
    context.fillStyle = shade(residual);
    context.beginPath();
    context.arc((u + 0.5) * scale, (v + 0.5) * scale, 2.2, 0, 7);
    context.fill();
  }
  const median = drawn.length ? drawn[drawn.length >> 1][2].toFixed(2) : "-";
  text.textContent = `${name}: ${f.points2d ? "" : `median residual ${median}, `}${drawn.length} points`;
}

function curve(f) {
  const canvas = el("curve"), ratio = devicePixelRatio || 1, w = canvas.clientWidth, h = canvas.clientHeight;
  canvas.width = w * ratio;
  canvas.height = h * ratio;
  const c = canvas.getContext("2d");
  c.scale(ratio, ratio);
  c.font = "11px system-ui, sans-serif";
  if (!f.steps.length) return;
  const top = Math.max(...f.steps.map((s) => s.cost || 0)) * 1.1 || 1, left = 34, bottom = h - 16;
  const x = (k) => left + ((w - left - 8) * k) / Math.max(f.steps.length - 1, 1), y = (v) => bottom - ((bottom - 8) * v) / top;
  c.strokeStyle = "#2b333c";
  c.fillStyle = "#a9b5c1";
  for (const share of [0, 0.5, 1]) {
    const v = share * top / 1.1;
    c.beginPath(); c.moveTo(left, y(v)); c.lineTo(w - 8, y(v)); c.stroke();
    c.fillText(v.toFixed(2), 4, y(v) + 4);
  }
  let at = left;
  for (const [text, colour] of [["cost by step, px per cell:", "#a9b5c1"], ...strides.map((s) => [String(s), strideColour(s)])]) {
    c.fillStyle = colour;
    c.fillText(text, at, h - 3);
    at += c.measureText(text).width + 8;
  }
  f.steps.forEach((s, k) => {
    if (s.cost === null) return;
    c.fillStyle = strideColour(s.stride);
    c.beginPath(); c.arc(x(k), y(s.cost), k === stepNumber ? 5.5 : 3, 0, 7); c.fill();
  });
}

function facts(f) {
  const step = f.steps.length ? stepOf(f, stepNumber) : null;
  const rows = [["state", f.state + (f.reason ? `: ${f.reason}` : "")]];
  if (step) {
    rows.push(["level", `stride ${step.stride}`], ["cost", step.cost === null ? "-" : step.cost.toFixed(4)]);
    rows.push(["from the end", `${step.cm.toFixed(2)} cm, ${step.deg.toFixed(3)} deg`]);
    if ("error_cm" in step) rows.push(["from the source's pose", `${step.error_cm.toFixed(1)} cm, ${step.error_deg.toFixed(2)} deg`]);
    rows.push(["reference views", f.references.map((k) => data.reference_ids[k]).join(", ")]);
  }
  el("facts").replaceChildren(...rows.map((row) => {
    const line = document.createElement("tr");
    line.append(...row.map((text) => { const cell = document.createElement("td"); cell.textContent = text; return cell; }));
    return line;
  }));
}

// ---- drawing

function draw() { renderer.render(scene, eye); }

function lookThrough(pose) {
  if (!pose) return;
  const at = (p) => new THREE.Vector3(...toMap(pose, p));
  eye.position.copy(at([0, 0, 0]));
  eye.up.copy(at([0, -1, 0]).sub(eye.position));
  orbit.target.copy(at([0, 0, 1.5]));
  const camera = cameraOf(frame());
  eye.fov = (360 / Math.PI) * Math.atan(camera[1] / 2 / camera[3]);
}

function lookAtAll() {
  const forward = new THREE.Vector3(), a = frame().pose || frame().coarse || data.references[0];
  forward.set(a[2], a[6], a[10]).addScaledVector(up, -forward.dot(up));
  eye.up.copy(up);
  eye.fov = 55;
  orbit.target.copy(middle);
  eye.position.copy(middle).addScaledVector(forward.normalize(), -0.55 * size).addScaledVector(up, 0.4 * size);
}

function show() {
  const f = frame();
  const step = el("step");
  step.max = Math.max(f.steps.length - 1, 0);
  step.value = stepNumber = Math.min(stepNumber, Math.max(f.steps.length - 1, 0));
  el("frame-text").textContent = `${f.index}`;
  el("step-text").textContent = f.steps.length ? `${stepNumber} of ${f.steps.length - 1}` : "-";
  const pose = poseNow(), way = [];
  data.frames.slice(0, frameNumber + 1).forEach((g, k, all) => {
    const before = k && all[k - 1].pose;
    if (before && g.pose) way.push(before[3], before[7], before[11], g.pose[3], g.pose[7], g.pose[11]);
  });
  refill("pose", [...(pose ? [linesOf(frustum(pose, symbol, cameraOf(f)), COLOURS.pose)] : []), linesOf(way, COLOURS.way)]);
  const trail = [];
  for (let k = 1; k <= stepNumber; k++) {
    const [a, b] = [f.steps[k - 1].pose, f.steps[k].pose];
    trail.push(a[3], a[7], a[11], b[3], b[7], b[11]);
  }
  layers.pose.group.add(linesOf(trail, 0xffffff));
  refill("coarse", f.coarse ? [linesOf(frustum(f.coarse, 0.85 * symbol), COLOURS.coarse)] : []);
  refill("truth", f.truth ? [linesOf(frustum(f.truth, 1.15 * symbol), COLOURS.truth)] : []);
  refill("used", [linesOf(f.references.flatMap((k) => frustum(data.references[k], 0.7 * symbol)), COLOURS.used)]);
  paint(el("before"), el("before-text"), f, 0, "start");
  paint(el("now"), el("now-text"), f, stepNumber, `step ${stepNumber}`);
  curve(f);
  facts(f);
  if (follows) lookThrough(pose);
  eye.updateProjectionMatrix();
  orbit.update();
  draw();
}

function goto(number, step) {
  frameNumber = Math.min(Math.max(number, 0), data.frames.length - 1);
  el("frame").value = frameNumber;
  stepNumber = step === undefined ? Math.max(frame().steps.length - 1, 0) : Math.max(step, 0);
  show();
}

/** One step on, then the next frame; from the end back to the first. */
function advance() {
  if (stepNumber < frame().steps.length - 1) goto(frameNumber, stepNumber + 1);
  else goto((frameNumber + 1) % data.frames.length, 0);
}

function resize() {
  const box = el("scene").getBoundingClientRect();
  renderer.setSize(box.width, box.height, false);
  eye.aspect = box.width / box.height;
  eye.updateProjectionMatrix();
  curve(frame());
  draw();
}

el("title").textContent = document.title = data.title;
el("bar").style.background = `linear-gradient(to right, ${STOPS.map((_, k) => shade(k / (STOPS.length - 1))).join(",")})`;
el("frame").max = data.frames.length - 1;
el("frame").oninput = () => goto(Number(el("frame").value));
el("step").oninput = () => goto(frameNumber, Number(el("step").value));
el("play").onclick = () => {
  if (timer) { clearInterval(timer); timer = null; } else timer = setInterval(advance, 180);
  el("play").textContent = timer ? "stop" : "play";
};
if (data.residual_text) el("residual-text").textContent = data.residual_text;

/** Record the steps of the frame as they are drawn in 3-D; the browser saves a WebM file. */
let recorder = null;
function record() {
  if (recorder) { recorder.stop(); return; }
  if (!window.MediaRecorder || !renderer.domElement.captureStream) { el("said").textContent = "this browser cannot record"; return; }
  const kind = ["video/webm;codecs=vp9", "video/webm;codecs=vp8", "video/webm"].find((k) => MediaRecorder.isTypeSupported(k));
  if (!kind) { el("said").textContent = "this browser writes no WebM"; return; }
  if (timer) el("play").onclick();
  const parts = [];
  recorder = new MediaRecorder(renderer.domElement.captureStream(30), { mimeType: kind, videoBitsPerSecond: 8e6 });
  recorder.ondataavailable = (event) => parts.push(event.data);
  const beat = setInterval(() => {
    if (stepNumber < frame().steps.length - 1) goto(frameNumber, stepNumber + 1);
    else { clearInterval(beat); setTimeout(() => recorder && recorder.stop(), 700); }
  }, 120);
  recorder.onstop = () => {
    clearInterval(beat);
    recorder = null;
    el("record").textContent = "record video";
    const blob = new Blob(parts, { type: "video/webm" }), link = document.createElement("a");
    link.href = URL.createObjectURL(blob);
    link.download = `${data.title.replace(/[^\w.-]+/g, "_")}_${frame().index}.webm`;
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 60000);
    document.body.dataset.recorded = blob.size;
    el("said").textContent = `${link.download}, ${Math.round(blob.size / 1000)} kB`;
  };
  recorder.start(200);
  el("record").textContent = "stop recording";
  goto(frameNumber, 0);
}
el("record").onclick = record;

/** Show other data: this page again, with them in it. */
function restart(other) {
  if (timer) clearInterval(timer);
  if (turning) turn();
  const text = JSON.stringify(other).replace(/<\//g, "<\\/");
  const html = PAGE.replace(/(<script id="data"[^>]*>)[\s\S]*?(<\/script>)/, (_, before, after) => before + text + after);
  renderer.dispose();
  document.open();
  document.write(`<!doctype html>${html}`);
  document.close();
}

/** Pose, the upper three rows of T_map_camera, of PixLoc's [[qw, qx, qy, qz], [tx, ty, tz]], world to camera. */
function poseOf([[w, x, y, z], t]) {
  const n = Math.hypot(w, x, y, z), [a, b, c, d] = [w / n, x / n, y / n, z / n];
  const R = [
    [1 - 2 * (c * c + d * d), 2 * (b * c - a * d), 2 * (b * d + a * c)],
    [2 * (b * c + a * d), 1 - 2 * (b * b + d * d), 2 * (c * d - a * b)],
    [2 * (b * d - a * c), 2 * (c * d + a * b), 1 - 2 * (b * b + c * c)],
  ];
  return [0, 1, 2].flatMap((k) => [R[0][k], R[1][k], R[2][k], -(R[0][k] * t[0] + R[1][k] * t[1] + R[2][k] * t[2])]);
}

/** Data of this page from dump.json and dump_p2d.json of the original PixLoc's viewer. */
function fromDump(dump, p2d, images) {
  const corners = dump.camera.query, width = 640, f = width / (corners[2][0] - corners[0][0]);
  const camera = [width, f * (corners[2][1] - corners[0][1]), f, f, -corners[0][0] * f, -corners[0][1] * f];
  const poses = dump.T.query.map(poseOf), last = poses[poses.length - 1], xyz = dump.p3d.xyz;
  const bounds = [0, 1, 2].map((k) => xyz.reduce(([low, high], p) => [Math.min(low, p[k]), Math.max(high, p[k])], [Infinity, -Infinity]));
  const corner = { low: bounds.map((b) => b[0]), size: bounds.map((b) => Math.max(b[1] - b[0], 1e-6)) };
  const down = [1, 5, 9].map((k) => last[k]), most = down.reduce((best, v, k) => (Math.abs(v) > Math.abs(down[best]) ? k : best), 0);
  const away = (p) => ({
    cm: 100 * Math.hypot(...[3, 7, 11].map((k) => p[k] - last[k])),
    deg: (180 / Math.PI) * Math.acos(Math.min(Math.max((p.reduce((s, v, k) => s + (k % 4 < 3 ? v * last[k] : 0), 0) - 1) / 2, -1), 1)),
  });
  const points2d = p2d ? p2d.query : dump.p2d && dump.p2d.query ? poses.map((_, k) => (k === poses.length - 1 ? dump.p2d.query : [])) : null;
  return {
    title: "PixLoc's dump", up: [0, 1, 2].map((k) => (k === most ? -Math.sign(down[k]) : 0)), camera, residual_steps: 1,
    map: { ...corner, xyz, colours: dump.p3d.colors }, scene: { ...corner, xyz: [], colours: [] },
    references: dump.T.refs.map(poseOf), reference_ids: dump.T.refs.map((_, k) => (dump.image && dump.image.refs ? dump.image.refs[k] : k)),
    points: dump.T.refs.map(() => ({ xyz: [] })),
    frames: [{ index: 0, state: `${poses.length} steps`, reason: "", image: images[dump.image && dump.image.query] || "", coarse: poses[0],
      pose: last, truth: null, references: dump.T.refs.map((_, k) => k), points2d: points2d || poses.map(() => []),
      residuals: [], steps: poses.map((pose) => ({ pose, cost: null, stride: 1, ...away(pose) })) }],
  };
}

async function openFiles(files) {
  const found = [], images = {};
  try {
    for (const file of files) {
      if (/\.json$/i.test(file.name)) found.push(JSON.parse(await file.text()));
      else images[file.name] = await new Promise((done) => { const r = new FileReader(); r.onload = () => done(r.result); r.readAsDataURL(file); });
    }
    const own = found.find((json) => json.frames && json.camera), dump = found.find((json) => json.T && json.p3d);
    if (!own && !dump) throw new Error("neither frames and camera (this page's data) nor T and p3d (PixLoc's dump.json) are in it");
    restart(own || fromDump(dump, found.find((json) => json.query && json.masks), images));
  } catch (error) {
    el("said").textContent = `cannot be shown: ${error.message}`;
  }
}
el("open").onclick = () => el("files").click();
el("files").onchange = () => openFiles([...el("files").files]);
addEventListener("dragover", (event) => event.preventDefault());
addEventListener("drop", (event) => { event.preventDefault(); openFiles([...event.dataTransfer.files]); });
el("follow").onclick = () => { follows = true; el("follow").classList.add("on"); show(); };
el("home").onclick = () => { follows = false; el("follow").classList.remove("on"); lookAtAll(); show(); };
orbit.addEventListener("change", draw);
orbit.addEventListener("start", () => { follows = false; el("follow").classList.remove("on"); });
addEventListener("resize", resize);
/** Keys of PixLoc's viewer: play, rotate, size of points and of cameras, start and end of the alignment. */
let turning = null;
function turn() {
  if (turning) { clearInterval(turning); turning = null; orbit.autoRotate = false; return; }
  orbit.autoRotate = true;
  orbit.autoRotateSpeed = 3;
  turning = setInterval(() => { orbit.update(); draw(); }, 33);
}
function resizePoints(factor) {
  scene.traverse((object) => { if (object.isPoints) object.material.size *= factor; });
  draw();
}
const KEYS = {
  p: () => el("play").onclick(), r: turn, v: record, "+": () => resizePoints(1.25), "-": () => resizePoints(0.8),
  "]": () => { symbol *= 1.25; show(); }, "[": () => { symbol *= 0.8; show(); },
  i: () => goto(frameNumber, 0), o: () => goto(frameNumber), a: () => { layers.pose.group.visible = !layers.pose.group.visible; draw(); },
  h: () => { el("hint").hidden = !el("hint").hidden; },
};
addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  if (KEYS[event.key]) { KEYS[event.key](); return; }
  const move = { ArrowRight: [0, 1], ArrowLeft: [0, -1], ArrowUp: [1, 0], ArrowDown: [-1, 0] }[event.key];
  if (!move || event.target.type === "range") return;
  event.preventDefault();
  if (move[0]) goto(frameNumber + move[0]);
  else goto(frameNumber, stepNumber + move[1]);
});
lookAtAll();
goto(0);
resize();
document.body.dataset.ready = "yes";
