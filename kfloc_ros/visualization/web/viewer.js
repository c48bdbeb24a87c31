// SPDX-License-Identifier: Apache-2.0
// Plays a localization: a scene in 3-D (three.js), the image of a frame with the map's points over it, two sliders.
// Data: see page.py. A pose is the upper three rows of T_map_camera; cameras look along z, y is down.

const data = JSON.parse(document.getElementById("data").textContent);
const [WIDTH, HEIGHT, FX, FY, CX, CY] = data.camera;
const COLOURS = { coarse: 0xef6c00, pose: 0x35a7ff, truth: 0x9aa5b1, used: 0xffc400, references: 0x56616d, way: 0x35a7ff };
const el = (id) => document.getElementById(id);
const up = new THREE.Vector3(...data.up);

const bytes = (text) => Uint8Array.from(atob(text), (c) => c.charCodeAt(0));

/** Points as a Float32Array, from 16-bit integers between two corners. */
function unpack(cloud) {
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
  geometry.setAttribute("color", new THREE.BufferAttribute(bytes(cloud.colours), 3, true));
  return new THREE.Points(geometry, new THREE.PointsMaterial({ size, vertexColors: true, sizeAttenuation: true }));
}

function linesOf(positions, colour, opacity = 1) {
  const geometry = new THREE.BufferGeometry();
  geometry.setAttribute("position", new THREE.BufferAttribute(new Float32Array(positions), 3));
  return new THREE.LineSegments(geometry, new THREE.LineBasicMaterial({ color: colour, transparent: opacity < 1, opacity }));
}

const toMap = (pose, p) => [0, 1, 2].map((r) => pose[4 * r] * p[0] + pose[4 * r + 1] * p[1] + pose[4 * r + 2] * p[2] + pose[4 * r + 3]);

/** Line ends of a camera symbol: a pyramid from the centre to the image plane. */
function frustum(pose, depth) {
  const corner = (u, v) => toMap(pose, [((u - CX) / FX) * depth, ((v - CY) / FY) * depth, depth]);
  const c = [corner(0, 0), corner(WIDTH, 0), corner(WIDTH, HEIGHT), corner(0, HEIGHT)], o = toMap(pose, [0, 0, 0]);
  const ends = [];
  for (let k = 0; k < 4; k++) ends.push(...o, ...c[k], ...c[k], ...c[(k + 1) % 4]);
  return ends;
}

const extent = new THREE.Vector3(...data.map.size), middle = new THREE.Vector3(...data.map.low).addScaledVector(extent, 0.5);
const size = Math.max(extent.length(), 0.5);
const symbol = 0.022 * size;

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
const poseNow = () => (frame().steps.length ? stepOf(frame(), stepNumber).pose : frame().pose || frame().coarse);

function referencePoints(view) {
  if (!points.has(view)) points.set(view, unpack(data.points[view]));
  return points.get(view);
}

function pictureOf(f) {
  if (!pictures.has(f)) {
    const image = new Image();
    image.src = "data:image/jpeg;base64," + f.image;
    pictures.set(f, image.decode().then(() => image));
  }
  return pictures.get(f);
}

/** Where the points of the frame's reference views are seen from a pose, with their residuals at a step. */
function* projected(f, step) {
  const pose = stepOf(f, step).pose, residuals = bytes(f.residuals[Math.min(step, f.residuals.length - 1)]);
  let k = 0;
  for (const view of f.references) {
    const p = referencePoints(view);
    for (let i = 0; i < p.length; i += 3, k++) {
      if (residuals[k] === 255) continue;
      const d = [p[i] - pose[3], p[i + 1] - pose[7], p[i + 2] - pose[11]];
      const [x, y, z] = [0, 1, 2].map((c) => pose[c] * d[0] + pose[4 + c] * d[1] + pose[8 + c] * d[2]);
      if (z > 0.05) yield [(FX * x) / z + CX, (FY * y) / z + CY, residuals[k] / data.residual_steps];
    }
  }
}

async function paint(canvas, text, f, step, name) {
  const image = await pictureOf(f);
  if (f !== frame()) return;
  canvas.width = image.naturalWidth;
  canvas.height = image.naturalHeight;
  const context = canvas.getContext("2d"), scale = image.naturalWidth / WIDTH;
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
  text.textContent = `${name}: median residual ${median}, ${drawn.length} points`;
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
  c.fillText("cost by step (blue: coarse level, orange: fine level)", left, h - 3);
  f.steps.forEach((s, k) => {
    if (s.cost === null) return;
    c.fillStyle = s.stride === 8 ? "#35a7ff" : "#ef9c3c";
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
  eye.fov = (360 / Math.PI) * Math.atan(HEIGHT / 2 / FY);
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
  refill("pose", [...(pose ? [linesOf(frustum(pose, symbol), COLOURS.pose)] : []), linesOf(way, COLOURS.way)]);
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
el("follow").onclick = () => { follows = true; el("follow").classList.add("on"); show(); };
el("home").onclick = () => { follows = false; el("follow").classList.remove("on"); lookAtAll(); show(); };
orbit.addEventListener("change", draw);
orbit.addEventListener("start", () => { follows = false; el("follow").classList.remove("on"); });
addEventListener("resize", resize);
addEventListener("keydown", (event) => {
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
