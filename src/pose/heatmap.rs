//! A plain chain of convolutions with one logit map per keypoint: the form in which small pose networks of one's own
//! are given.
//!
//! A safetensors file whose metadata key `pose_network` holds JSON:
//! ```json
//! {"kind": "heatmap", "stride": 4, "keypoints": ["head", "left_hand", "right_hand"],
//!  "layers": [{"name": "layers.0", "stride": 2, "kernel": 3, "relu": true}, ...],
//!  "limbs": [["head", "left_hand"]]}
//! ```
//! and with the tensors `NAME.weight` (out, in, kernel, kernel) and `NAME.bias` of every layer. Kernels are odd, with
//! `kernel / 2` zeros on every side. The input is RGB in [-1, 1]; the sigmoid of the last layer's output is the
//! confidence, and cell (i, j) stands for pixel (i, j) times `stride`. `limbs` may be left out: they then follow from
//! the names. Hands are the keypoints whose names end in `hand`.

use super::PoseNetwork;
use super::detection::{Detection, Keypoint};
use super::grouping::group_by_distance;
use super::peaks::Map;
use super::skeleton::Skeleton;
use super::weights::NetworkWeights;
use crate::error::{Error, Result};
use crate::io::safetensors::MappedFile;
use crate::kernels::conv::{Conv2d, Padding};
use crate::kernels::cpu::view;
use crate::kernels::pixels::channels_last;
use crate::kernels::relu::{relu, sigmoid};
use crate::kernels::{Value, no_grad};
use candle_core::Tensor;
use serde::Deserialize;
use std::path::Path;

/// The network of the drawn world ([`crate::world`]), made by `scripts/world/pose.py`.
const WORLD: &[u8] = include_bytes!("../../assets/world/pose.safetensors");

/// The metadata key.
pub const METADATA: &str = "pose_network";

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Spec {
    kind: String,
    stride: usize,
    keypoints: Vec<String>,
    layers: Vec<LayerSpec>,
    limbs: Option<Vec<(String, String)>>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct LayerSpec {
    name: String,
    stride: usize,
    kernel: usize,
    relu: bool,
}

/// The network.
pub struct HeatmapNetwork {
    name: String,
    fingerprint: String,
    skeleton: Skeleton,
    stride: usize,
    layers: Vec<(Conv2d, bool)>,
}

/// Confidence at which a peak counts.
const PEAK: f32 = 0.5;

impl HeatmapNetwork {
    /// Reads a file. Errors (usage): not such a file; layers that do not fit together.
    pub fn load(path: &Path) -> Result<Self> {
        Self::from_weights(&NetworkWeights::open("the heatmap network", path)?)
    }

    /// The network of the drawn world, which is built in.
    pub fn world() -> Result<Self> {
        let file = MappedFile::from_bytes(Path::new("world (built in)"), WORLD.to_vec())?;
        Self::from_weights(&NetworkWeights::from_safetensors("the heatmap network", &file)?)
    }

    /// The network of an open file.
    pub fn from_weights(weights: &NetworkWeights) -> Result<Self> {
        let bad = |what: String| {
            Error::usage(format!("`{}` is not a heatmap network", weights.path().display())).detail(what)
        };
        let Some(json) = weights.metadata().get(METADATA) else {
            return Err(bad(format!("it has no `{METADATA}` in its metadata"))
                .hint("docs/pose.md shows the form; `posenet` and `openpose` are networks by name"));
        };
        let spec: Spec = serde_json::from_str(json).map_err(|e| bad(format!("its `{METADATA}`: {e}")))?;
        if spec.kind != "heatmap" {
            return Err(bad(format!("its `{METADATA}` is of another kind")).expected("heatmap", spec.kind));
        }
        let strides: usize = spec.layers.iter().map(|l| l.stride).product();
        if spec.layers.is_empty() || spec.keypoints.is_empty() || strides != spec.stride {
            return Err(bad("its layers do not give its maps".into())
                .expected(format!("strides whose product is {}", spec.stride), strides));
        }
        let mut skeleton = Skeleton::of(&spec.keypoints);
        if let Some(limbs) = &spec.limbs {
            let index = |name: &String| {
                let unknown = || bad(format!("a limb names the keypoint `{name}`, which it does not have"));
                skeleton.index(name).ok_or_else(unknown)
            };
            let limbs = limbs.iter().map(|(a, b)| Ok((index(a)?, index(b)?))).collect::<Result<_>>()?;
            skeleton = skeleton.with_limbs(limbs);
        }
        let mut layers = Vec::new();
        let mut input = 3;
        for (i, layer) in spec.layers.iter().enumerate() {
            if layer.kernel % 2 == 0 || layer.stride == 0 {
                return Err(bad(format!("layer `{}`", layer.name)).expected(
                    "an odd kernel and a stride of 1 or more",
                    format!("kernel {} and stride {}", layer.kernel, layer.stride),
                ));
            }
            let output = match i + 1 == spec.layers.len() {
                true => spec.keypoints.len(),
                false => weights.dim(&format!("{}.bias", layer.name))?,
            };
            let padding = Padding::all(layer.kernel / 2);
            let conv = weights.conv(&layer.name, [output, input, layer.kernel], layer.stride, padding)?;
            layers.push((conv, layer.relu));
            input = output;
        }
        let file = weights.path().file_name().unwrap_or_default().to_string_lossy();
        Ok(Self {
            name: format!("heatmap {file}"),
            fingerprint: blake3::hash(format!("{json}\n{}", weights.fingerprint()?).as_bytes()).to_hex().to_string(),
            skeleton,
            stride: spec.stride,
            layers,
        })
    }
}

impl PoseNetwork for HeatmapNetwork {
    fn name(&self) -> &str {
        &self.name
    }

    fn fingerprint(&self) -> &str {
        &self.fingerprint
    }

    fn skeleton(&self) -> &Skeleton {
        &self.skeleton
    }

    fn stride(&self) -> usize {
        self.stride
    }

    /// Such networks are small and see a fixed number of pixels around a keypoint: pictures stay as they are.
    fn detection_side(&self) -> usize {
        2048
    }

    fn maps(&self, images: &Value) -> Result<Value> {
        let mut x = channels_last(images)?;
        for (conv, rectified) in &self.layers {
            x = conv.forward(&x)?;
            if *rectified {
                x = relu(&x)?;
            }
        }
        sigmoid(&x)
    }

    fn detect(&self, image: &Tensor) -> Result<Detection> {
        let (_, _, height, width) = image.dims4()?;
        let maps = no_grad(|| self.maps(&Value::constant(image.clone())))?;
        let (_, h, w, channels) = maps.tensor().dims4()?;
        let values = view(maps.tensor())?;
        let map = |channel| Map { values: &values, height: h, width: w, channels, channel };
        let stride = self.stride as f32;
        let keypoint = |p: super::peaks::Peak| Keypoint { x: p.x * stride, y: p.y * stride, score: p.score };
        let peaks: Vec<Vec<Keypoint>> =
            (0..channels).map(|k| map(k).peaks(PEAK, 1).into_iter().map(keypoint).collect()).collect();
        let mut found = Detection {
            height,
            width,
            persons: group_by_distance(&peaks),
            hands: Vec::new(),
            soft_counts: (0..channels).map(|k| map(k).mass()).collect(),
            peaks,
        };
        match self.skeleton.hands().is_empty() {
            true => found.add_hands_at_wrists(&self.skeleton, 2.0 * stride),
            false => found.add_hands_at_peaks(&self.skeleton, 4.0 * stride),
        }
        Ok(found)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::io::safetensors::{RawTensor, write};
    use candle_core::Device;
    use std::collections::BTreeMap;

    /// A network made by hand: red blobs are heads, green ones left hands, by a 5x5 mean of one channel against both
    /// others, at stride 2.
    fn file(folder: &Path, json: &str, input: usize) -> std::path::PathBuf {
        let mut first = vec![0f32; 2 * 3 * 25];
        for output in 0..2 {
            for input in 0..3 {
                let value = if input == output { 1.0 } else { -1.0 };
                first[(output * 3 + input) * 25..][..25].fill(value / 25.0);
            }
        }
        // Pure colour gives 3: rectified, and then a logit of 12 * 3 - 24.
        let second = [12f32, 0.0, 0.0, 12.0];
        let tensor = |name: &str, values: &[f32], shape: &[usize]| {
            RawTensor::from_tensor(name, &Tensor::from_slice(values, shape, &Device::Cpu).unwrap()).unwrap()
        };
        let tensors = vec![
            tensor("layers.0.weight", &first, &[2, 3, 5, 5]),
            tensor("layers.0.bias", &[0.0, 0.0], &[2]),
            tensor("layers.1.weight", &second[..2 * input], &[2, input, 1, 1]),
            tensor("layers.1.bias", &[-24.0, -24.0], &[2]),
        ];
        let path = folder.join("net.safetensors");
        write(&path, tensors, &BTreeMap::from([(METADATA.to_string(), json.to_string())])).unwrap();
        path
    }

    const JSON: &str = r#"{"kind": "heatmap", "stride": 2, "keypoints": ["head", "left_hand"], "layers": [
        {"name": "layers.0", "stride": 2, "kernel": 5, "relu": true},
        {"name": "layers.1", "stride": 1, "kernel": 1, "relu": false}]}"#;

    /// Squares of 9 pixels on black: (centre row, centre column, channel).
    fn scene(squares: &[(usize, usize, usize)]) -> Tensor {
        let (h, w) = (48, 80);
        let mut pixels = vec![-1f32; 3 * h * w];
        for &(y, x, c) in squares {
            for (dy, dx) in (0..81).map(|i| (i / 9, i % 9)) {
                pixels[(c * h + y + dy - 4) * w + x + dx - 4] = 1.0;
            }
        }
        Tensor::from_vec(pixels, (1, 3, h, w), &Device::Cpu).unwrap()
    }

    #[test]
    fn persons_and_hands_of_a_drawn_scene_are_counted_where_they_are() {
        let folder = tempfile::tempdir().unwrap();
        let network = HeatmapNetwork::load(&file(folder.path(), JSON, 2)).unwrap();
        assert_eq!((network.stride(), network.skeleton().counted().what), (2, "hands"));
        let found = network.detect(&scene(&[(10, 16, 0), (10, 60, 0), (30, 10, 1), (30, 70, 1), (36, 30, 1)])).unwrap();
        assert_eq!((found.persons.len(), found.hands.len()), (2, 3));
        assert_eq!(found.num_limb_ends(network.skeleton()), 3);
        let mut heads: Vec<(f32, f32)> = found.peaks[0].iter().map(|k| (k.x, k.y)).collect();
        heads.sort_by(|a, b| a.0.total_cmp(&b.0));
        for (got, x) in heads.iter().zip([16.0, 60.0]) {
            assert!((got.0 - x).abs() <= 2.0 && (got.1 - 10.0).abs() <= 2.0, "{got:?}");
        }
        // One of the three hands belongs to nobody.
        assert_eq!(found.persons.iter().filter(|p| p.keypoints[1].is_some()).count(), 2);
        assert!(found.hands.iter().all(|h| h.side == "left"));
        let none = network.detect(&scene(&[])).unwrap();
        assert!(none.persons.is_empty() && none.hands.is_empty());
        assert!(none.soft_counts.iter().all(|c| *c < 0.01));
        assert!(found.soft_counts[1] > 1.4 * found.soft_counts[0]);
    }

    #[test]
    fn what_is_not_such_a_network_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        for (json, input, words) in [
            (
                JSON.replace("\"stride\": 2, \"keypoints\"", "\"stride\": 4, \"keypoints\""),
                2,
                "whose product is 4, found 2",
            ),
            (JSON.replace("heatmap", "regression"), 2, "expected heatmap, found regression"),
            (JSON.replace("\"kernel\": 5", "\"kernel\": 4"), 2, "an odd kernel"),
            (JSON.replace("\"kernel\": 5", "\"kernel\": 3"), 2, "expected shape [2, 3, 3, 3], found [2, 3, 5, 5]"),
            (JSON.replace("layers.1", "layers.7"), 2, "the nearest name there is `layers."),
            (JSON.into(), 1, "weights of another network"),
            (JSON.replace("\"relu\": true", "\"rule\": true"), 2, "unknown field `rule`"),
        ] {
            let error = HeatmapNetwork::load(&file(folder.path(), &json, input)).err().expect("refused");
            assert_eq!(error.exit_code(), 2);
            assert!(error.to_string().contains(words), "{words}: {error}");
        }
        let plain = folder.path().join("plain.safetensors");
        write(&plain, Vec::new(), &BTreeMap::new()).unwrap();
        let error = HeatmapNetwork::load(&plain).err().expect("refused").to_string();
        assert!(error.contains("`pose_network`"), "{error}");
    }
}
