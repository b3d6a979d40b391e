// An exported folder in Node, by export.json alone: node early_exit.js FOLDER IMAGES [THRESHOLD]
//
// IMAGES is a file of normalised pictures, float32 [B,3,S,S]; export.json's "preprocess" says how they are made.
// Prints one JSON line for each picture: label, probability and the level at which it stopped.
"use strict";
const fs = require("node:fs");
const path = require("node:path");
const ort = require("onnxruntime-node");

// The float32 matrix of a .npy file: its rows.
function matrix(file) {
  const bytes = fs.readFileSync(file);
  const start = 10 + bytes.readUInt16LE(8);
  const [, count, width] = /'<f4'.*\((\d+), (\d+)\)/.exec(bytes.toString("latin1", 10, start)).map(Number);
  const values = new Float32Array(Uint8Array.from(bytes.subarray(start)).buffer);
  return Array.from({ length: count }, (_, row) => values.subarray(row * width, (row + 1) * width));
}

// The rows of a tensor, in a new one.
function take(tensor, rows) {
  const width = tensor.data.length / tensor.dims[0];
  const data = new tensor.data.constructor(rows.length * width);
  rows.forEach((row, place) => data.set(tensor.data.subarray(row * width, (row + 1) * width), place * width));
  return new ort.Tensor(tensor.type, data, [rows.length, ...tensor.dims.slice(1)]);
}

function softmax(logits) {
  const most = Math.max(...logits);
  const odds = logits.map((logit) => Math.exp(logit - most));
  const sum = odds.reduce((a, b) => a + b);
  return odds.map((value) => value / sum);
}

async function classify(folder, values, threshold) {
  const about = JSON.parse(fs.readFileSync(path.join(folder, "export.json"), "utf8"));
  if (about.version !== 1) throw new Error("export.json is not of version 1; a cascade needs pictures for each model");
  const classes = matrix(path.join(folder, "classes.npy"));
  const size = about.preprocess.size;
  threshold ??= about.gate?.threshold ?? Infinity;
  let inputs = [new ort.Tensor("float32", values, [values.length / (3 * size * size), 3, size, size])];
  let live = [...Array(inputs[0].dims[0]).keys()];
  const answers = [];
  for (const [level, stage] of about.stages.entries()) {
    const session = await ort.InferenceSession.create(path.join(folder, stage.file));
    const results = await session.run(Object.fromEntries(stage.inputs.map((name, place) => [name, inputs[place]])));
    const [z, ...state] = stage.outputs.map((name) => results[name]);
    const go = [];
    live.forEach((picture, row) => {
      const embedding = take(z, [row]).data;
      const cosines = classes.map((name) => name.reduce((sum, value, place) => sum + value * embedding[place], 0));
      const p = softmax(cosines.map((cosine) => about.logit_scale * cosine));
      const [first, second] = [...p].sort((a, b) => b - a);
      answers[picture] = { label: about.class_names[p.indexOf(first)], probability: first, level };
      if (first - second < threshold) go.push(row);
    });
    if (!go.length) break;
    live = go.map((row) => live[row]);
    inputs = state.map((tensor) => take(tensor, go));
  }
  return answers;
}

const [folder, images, threshold] = process.argv.slice(2);
const pixels = new Float32Array(Uint8Array.from(fs.readFileSync(images)).buffer);
classify(folder, pixels, threshold && Number(threshold)).then((answers) => {
  for (const answer of answers) console.log(JSON.stringify(answer));
});
