use super::*;
use crate::kernels::backward;
use crate::kernels::cpu::view;
use crate::kernels::testing::randn;
use crate::pose::compare::compare;
use crate::pose::posenet::PoseNet;
use crate::pose::weights::Recorded;
use crate::pose::{PoseNetwork, PoseSpec};
use candle_core::DType;
use image::Rgb;

fn photo(name: &str) -> RgbImage {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("examples/photos").join(name);
    crate::data::image::load(&path).unwrap()
}

/// A rounded line, darker towards its edges, from `a` with radius `ra` to `b` with radius `rb`.
fn stroke(image: &mut RgbImage, (ax, ay, ra): (f32, f32, f32), (bx, by, rb): (f32, f32, f32)) {
    let (dx, dy) = (bx - ax, by - ay);
    for (x, y, pixel) in image.enumerate_pixels_mut() {
        let (x, y) = (x as f32, y as f32);
        let t = (((x - ax) * dx + (y - ay) * dy) / (dx * dx + dy * dy)).clamp(0.0, 1.0);
        let off = (x - ax - t * dx).hypot(y - ay - t * dy) / (ra + t * (rb - ra));
        if off < 1.0 {
            *pixel = Rgb([224.0, 172.0, 140.0].map(|c: f32| (c * (1.0 - 0.45 * off * off)) as u8));
        }
    }
}

/// The back of a hand with its fingers up, drawn around a place; `thumb`: 1 to the right, a left hand, -1 to the left.
fn draw_hand(image: &mut RgbImage, cx: f32, cy: f32, size: f32, thumb: f32) {
    let at = |x: f32, y: f32, r: f32| (cx + thumb * x * size, cy - y * size, r * size);
    stroke(image, at(0.0, -1.6, 0.33), at(0.0, -0.3, 0.38));
    for (x, y, tip_x, tip_y, r) in [
        (-0.36, 0.45, -0.62, 1.15, 0.115),
        (-0.13, 0.52, -0.2, 1.42, 0.125),
        (0.12, 0.52, 0.14, 1.5, 0.13),
        (0.36, 0.45, 0.48, 1.32, 0.125),
    ] {
        stroke(image, at(x, y, 1.1 * r), at(tip_x, tip_y, 0.85 * r));
    }
    stroke(image, at(0.3, -0.25, 0.2), at(0.95, 0.5, 0.12));
    for x in [-0.3, -0.1, 0.1, 0.3] {
        stroke(image, at(0.7 * x, -0.3, 0.24), at(1.1 * x, 0.42, 0.2));
    }
}

fn scene(hands: &[(f32, f32, f32, f32)]) -> RgbImage {
    let mut image = RgbImage::from_pixel(256, 256, Rgb([90, 110, 130]));
    hands.iter().for_each(|&(x, y, size, thumb)| draw_hand(&mut image, x, y, size, thumb));
    image
}

#[test]
fn both_networks_equal_their_twins_in_pytorch_to_1e_4() {
    let recorded = Recorded::open("hands.safetensors");
    let finder = HandFinder::embedded().unwrap();
    let worst = |got: &Tensor, expected: &Tensor| {
        assert_eq!(got.dims(), expected.dims());
        (got - expected).unwrap().abs().unwrap().max_all().unwrap().to_scalar::<f32>().unwrap()
    };
    let heads = finder.palms.heads(&recorded.image()).unwrap();
    for (stride, (scores, boxes)) in [8, 16, 32].into_iter().zip(&heads) {
        let expected = |kind: &str| recorded.get(&format!("{kind}.{stride}")).permute((0, 2, 3, 1)).unwrap();
        let (score, area) = (worst(scores, &expected("score")), worst(boxes, &expected("box")));
        // Logits of what is no hand reach -450, boxes are in pixels.
        assert!(score < 5e-4 && area < 5e-4, "stride {stride}: {score:e} {area:e}");
        let chance = |t: &Tensor| candle_nn::ops::sigmoid(t).unwrap();
        assert!(worst(&chance(scores), &chance(&expected("score"))) < 1e-5);
    }

    // Grey up to 96 x 64, in [0, 1].
    let image = recorded.image();
    let image = image.pad_with_zeros(2, 0, 6).unwrap().pad_with_zeros(3, 0, 4).unwrap();
    let [points, presence, right] = finder.points.answers(&image.affine(0.5, 0.5).unwrap()).unwrap();
    for (name, got) in [("points", points), ("presence", presence), ("right", right)] {
        let expected = recorded.get(name).flatten_all().unwrap().to_vec1::<f32>().unwrap();
        assert_eq!(got.len(), expected.len());
        let worst = got.iter().zip(&expected).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
        assert!(worst < 1e-4 * expected.iter().fold(1.0, |m, v| v.abs().max(m)), "{name}: {worst:e}");
    }
}

#[test]
fn drawn_hands_are_found_where_they_are_and_photos_without_hands_have_none() {
    let finder = HandFinder::embedded().unwrap();
    for name in ["astronaut.jpg", "grace_hopper.jpg"] {
        let found = finder.find(&photo(name)).unwrap();
        assert!(found.is_empty(), "{name}: {found:?}");
    }
    assert!(finder.find(&scene(&[])).unwrap().is_empty());

    let places = [(70.0, 150.0, 35.0, 1.0), (190.0, 150.0, 35.0, -1.0)];
    let mut found = finder.find(&scene(&places)).unwrap();
    found.sort_by(|a, b| a.area.x0.total_cmp(&b.area.x0));
    assert_eq!(found.len(), 2, "{found:?}");
    for (hand, (x, y, size, _)) in found.iter().zip(places) {
        assert!(hand.score > 0.8, "{hand:?}");
        let middle_finger = hand.points[12].expect("a tip");
        // Its tip is drawn at 1.42 sizes above and 0.2 beside the middle.
        let off = (middle_finger.x - x).hypot(middle_finger.y - (y - 1.42 * size));
        assert!(off < 0.5 * size, "the tip of the middle finger is {off} pixels off");
        let wrist = hand.points[0].expect("a wrist");
        assert!((wrist.x - x).abs() < 0.5 * size && wrist.y > y, "{wrist:?}");
        let area = hand.area;
        assert!(area.y0 < y - 1.3 * size && area.y1 > y && area.height() < 3.5 * size, "{area:?}");
        assert!(area.x0 < x - 0.4 * size && area.x1 > x + 0.4 * size && area.width() < 3.5 * size, "{area:?}");
    }
    assert_eq!(found.iter().map(|h| h.side).collect::<Vec<_>>(), ["left", "right"]);
}

#[test]
fn a_crop_is_turned_with_the_hand() {
    // Fingers to the right: the crop's top is on the right.
    let mut points = [[0.0; 2]; 7];
    (points[0], points[2]) = ([10.0, 50.0], [30.0, 50.0]);
    let palm = Palm { score: 1.0, area: PixelBox::square(20.0, 50.0, 20.0), points };
    let crop = Crop::around(&palm, 2.0, 2.0);
    assert!((crop.side - 2.6 * 40.0).abs() < 1e-4);
    let near = |(x, y): (f32, f32), (a, b): (f32, f32)| assert!((x - a).hypot(y - b) < 1e-3, "{x} {y}");
    near(crop.point(0.5, 0.5), (60.0, 100.0));
    near(crop.point(0.5, 0.0), (60.0 + 52.0, 100.0));
    near(crop.point(0.0, 0.5), (60.0, 100.0 - 52.0));
    let picture = RgbImage::from_fn(200, 200, |x, _| Rgb([x as u8, 0, 0]));
    let cut = crop.cut(&picture).unwrap();
    let top = cut.get(0).unwrap().get(0).unwrap().get(0).unwrap().get(100).unwrap().to_scalar::<f32>().unwrap();
    assert!((top * 255.0 - 111.5).abs() < 1.0, "{top}");
}

fn with_hands() -> Box<dyn PoseNetwork> {
    let spec = PoseSpec { hand: Some(BUILTIN.into()), ..PoseSpec::default() };
    spec.load(Default::default(), &mut |_| {}).unwrap()
}

fn tensor(picture: &RgbImage) -> Tensor {
    let (w, h) = (picture.width() as usize, picture.height() as usize);
    Tensor::from_vec(crate::data::image::to_pixels(picture), (1, 3, h, w), &Device::Cpu).unwrap()
}

#[test]
fn the_map_counts_hands_beside_the_bodys_keypoints() {
    let network = with_hands();
    let plain = PoseNet::embedded().unwrap();
    assert_eq!(network.skeleton().counted().what, "hands");
    assert_ne!(network.fingerprint(), plain.fingerprint());

    let one = scene(&[(70.0, 150.0, 35.0, 1.0)]);
    let two = scene(&[(70.0, 150.0, 35.0, 1.0), (190.0, 150.0, 35.0, -1.0)]);
    let maps = |picture: &RgbImage| network.maps(&Value::constant(tensor(picture))).unwrap().into_tensor();
    let plain_maps = plain.maps(&Value::constant(tensor(&two))).unwrap().into_tensor();
    let all = maps(&two);
    assert_eq!(all.dims(), [1, 17, 17, 18]);
    let body = all.narrow(3, 0, 17).unwrap().contiguous().unwrap();
    assert_eq!(view(&body).unwrap().to_vec(), view(&plain_maps).unwrap().to_vec());

    let hands = |maps: &Tensor| view(&maps.narrow(3, 17, 1).unwrap().contiguous().unwrap()).unwrap().to_vec();
    let count = |maps: &Tensor| hands(maps).iter().sum::<f32>();
    assert!((1.3..3.0).contains(&count(&all)), "{}", count(&all));
    // Columns below 136 pixels, right of which the second hand is.
    let left = |maps: &Tensor| hands(maps).iter().enumerate().filter(|(i, _)| i % 17 < 8).map(|(_, v)| v).sum::<f32>();
    let alone = maps(&one);
    assert!((left(&all) - left(&alone)).abs() < 0.3 * left(&all), "{} {}", left(&all), left(&alone));
    assert!(count(&all) - left(&all) > 3.0 * (count(&alone) - left(&alone)));

    // The loss: nothing between equal maps, and one of two hands that is missing is an error of one half.
    let counted = network.skeleton().counted();
    let terms = |p: &Tensor, q: &Tensor| compare(&view(p).unwrap(), &view(q).unwrap(), 18, &counted);
    assert_eq!(terms(&all, &all).count, 0.0);
    assert!((0.05..0.3).contains(&terms(&alone, &all).count), "{}", terms(&alone, &all).count);

    let found = network.detect_picture(&two).unwrap();
    assert_eq!((found.hands.len(), found.peaks[17].len()), (2, 2));
    assert_eq!(found.soft_counts.len(), 18);
    let found = network.detect(&tensor(&one)).unwrap();
    assert_eq!(found.hands.len(), 1);
    let json = found.to_json(network.skeleton());
    assert_eq!(json["counts"]["hands"], 1);
    assert_eq!(json["hands"][0]["points"].as_array().unwrap().len(), 21);
}

#[test]
fn the_counts_gradient_reaches_the_image_and_equals_finite_differences() {
    let finder = HandFinder::embedded().unwrap();
    let image = tensor(&scene(&[(70.0, 150.0, 35.0, 1.0)]));
    // A part whose sides are no multiples of 32, with noise: in flat areas many values lie on ReLU's kink.
    let image = image.narrow(2, 80, 140).unwrap().narrow(3, 20, 110).unwrap().contiguous().unwrap();
    let image = (image + randn(3, &[1, 3, 140, 110], 0.02)).unwrap();
    let grid = HandGrid { stride: 16, height: 10, width: 8 };
    let leaf = Value::leaf(image.clone());
    let map = finder.map(&leaf, grid).unwrap();
    let seed = Tensor::ones(map.dims(), DType::F32, &Device::Cpu).unwrap();
    let grad = backward(vec![(map, seed)]).unwrap().take(&leaf).unwrap();
    let count = |image: &Tensor| -> f64 {
        let map = finder.map(&Value::constant(image.clone()), grid).unwrap();
        view(map.tensor()).unwrap().iter().map(|&v| f64::from(v)).sum()
    };
    // Along the gradient itself, and along a random direction. Kinks and rounding leave two digits.
    let norm = view(&grad).unwrap().iter().map(|g| g * g).sum::<f32>().sqrt();
    assert!(norm > 1e-3, "{norm}");
    let up = (&grad * f64::from(1.0 / norm)).unwrap();
    for (direction, step) in [(up, 2e-2), (randn(2, image.dims(), 1.0), 3e-4)] {
        let moved = |by: f64| count(&(&image + (&direction * by).unwrap()).unwrap());
        let numeric = (moved(step) - moved(-step)) / (2.0 * step);
        let along: f64 = view(&grad)
            .unwrap()
            .iter()
            .zip(&*view(&direction).unwrap())
            .map(|(g, d)| f64::from(*g) * f64::from(*d))
            .sum();
        assert!((numeric - along).abs() < 0.05 * along.abs().max(0.1 * f64::from(norm)), "{numeric} {along}");
    }
}

#[test]
fn hands_for_a_network_that_has_them_and_openposes_for_another_are_refused() {
    let load = |network: &str, hand: &str| {
        let spec = PoseSpec { network: network.into(), hand: Some(hand.into()), ..PoseSpec::default() };
        spec.load(Default::default(), &mut |_| {}).err().expect("refused")
    };
    let error = load("world", BUILTIN);
    assert_eq!(error.exit_code(), 2);
    assert!(error.to_string().contains("finds hands itself"), "{error}");
    let error = load("posenet", "hand_pose_model.pth").to_string();
    assert!(error.contains("goes with OpenPose alone") && error.contains("`builtin`"), "{error}");

    let weights = NetworkWeights::from_tensors("the hand networks", Path::new("other"), Default::default());
    let error = HandFinder::from_weights(&weights).err().expect("refused").to_string();
    assert!(error.contains("palm.blocks.0.depthwise.weight") && error.contains("another network"), "{error}");
}
