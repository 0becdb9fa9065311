//! The transformer's gradients do not depend on how a batch is cut or on what is kept between passes.

use candle_core::{DType, Device, Tensor};
use qwen_lora::io::safetensors::MappedFile;
use qwen_lora::kernels::no_grad;
use qwen_lora::model::transformer::{BaseWeights, Checkpointing, ImageShape, Inputs, QwenImageTransformer};
use std::path::PathBuf;

fn case(name: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/reference").join(name)
}

#[test]
fn quick_parity() {
    for name in ["case_a", "case_b"] {
        let model = QwenImageTransformer::load(
            &case(name).join("pipe/transformer"),
            DType::F32,
            &Device::Cpu,
            BaseWeights::Frozen,
        )
        .unwrap();
        let golden = MappedFile::open(&case(name).join("golden.safetensors")).unwrap();
        let get = |n: &str| golden.tensor(n, DType::F32, &Device::Cpu).unwrap();
        for c in ["b1_square", "b1_odd", "b2_mask", "b1_two_images"] {
            let p = |s: &str| format!("tf.{c}.{s}");
            let shapes: Vec<Vec<i64>> =
                golden.tensor(&p("img_shapes"), DType::I64, &Device::Cpu).unwrap().to_vec2().unwrap();
            let shapes: Vec<ImageShape> =
                shapes.iter().map(|s| (s[0] as usize, s[1] as usize, s[2] as usize)).collect();
            let text = get(&p("encoder_hidden_states"));
            let lengths: Vec<usize> = match golden.info(&p("encoder_hidden_states_mask")) {
                Some(_) => {
                    let m: Vec<Vec<i64>> = golden
                        .tensor(&p("encoder_hidden_states_mask"), DType::I64, &Device::Cpu)
                        .unwrap()
                        .to_vec2()
                        .unwrap();
                    m.iter().map(|r| r.iter().sum::<i64>() as usize).collect()
                }
                None => vec![text.dims()[1]; text.dims()[0]],
            };
            let inputs = Inputs {
                hidden_states: &get(&p("hidden_states")),
                encoder_hidden_states: &text,
                text_lengths: &lengths,
                timesteps: &get(&p("timestep")).to_vec1::<f32>().unwrap(),
                image_shapes: &shapes,
                additional_t_cond: None,
            };
            let err = |a: &Tensor, n: &str| {
                let g = get(n);
                let d = (a - &g).unwrap().abs().unwrap().max_all().unwrap().to_scalar::<f32>().unwrap();
                let t = g.abs().unwrap().max_all().unwrap().to_scalar::<f32>().unwrap();
                println!("{name} {n} {:e}", d / t);
            };
            let y = no_grad(|| {
                model.forward_observed(inputs, Checkpointing::None, false, &mut |n, t| {
                    let n = format!("tf.{c}.dbg.{n}");
                    if golden.info(&n).is_some() {
                        err(t, &n)
                    }
                })
            })
            .unwrap();
            err(y.tensor(), &p("output"));
        }
    }
}

#[test]
fn quick_grads() {
    use qwen_lora::adapters::{LoraAdapter, LoraModule};
    use qwen_lora::train::{step::*, trainable::Trainable};
    for name in ["case_a", "case_b"] {
        let mut model = QwenImageTransformer::load(
            &case(name).join("pipe/transformer"),
            DType::F32,
            &Device::Cpu,
            BaseWeights::Frozen,
        )
        .unwrap();
        let golden = MappedFile::open(&case(name).join("golden.safetensors")).unwrap();
        let get = |n: &str| golden.tensor(n, DType::F32, &Device::Cpu).unwrap();
        let mut ad = LoraAdapter::default();
        for n in golden.names() {
            if let Some(m) = n.strip_prefix("lora.init.").and_then(|n| n.strip_suffix(".lora_A.weight")) {
                ad.modules.insert(
                    m.into(),
                    LoraModule {
                        a: get(&n),
                        b: get(&n.replace("lora_A", "lora_B")),
                        alpha: 0.,
                        scale: if name == "case_a" { 2.0 } else { 1.5 },
                    },
                );
            }
        }
        let tr = Trainable::attach(&mut model, &ad).unwrap();
        let pack = |t: &Tensor| {
            let (b, c, _, h, w) = t.dims5().unwrap();
            t.reshape((b, c, h / 2, 2, w / 2, 2))
                .unwrap()
                .permute((0, 2, 4, 1, 3, 5))
                .unwrap()
                .reshape((b, h / 2 * (w / 2), c * 4))
                .unwrap()
        };
        let x0 = get("lora.in.x0");
        let noise = get("lora.in.noise").get(0).unwrap();
        let m: Vec<Vec<i64>> =
            golden.tensor("lora.in.encoder_hidden_states_mask", DType::I64, &Device::Cpu).unwrap().to_vec2().unwrap();
        let d = x0.dims();
        let sig = get("lora.in.sigma").get(0).unwrap().to_vec1::<f32>().unwrap();
        let b = NoisyBatch::mix(
            &pack(&x0),
            &pack(&noise),
            get("lora.in.encoder_hidden_states"),
            m.iter().map(|r| r.iter().sum::<i64>() as usize).collect(),
            sig,
            vec![1.0; 2],
            vec![(1, d[3] / 2, d[4] / 2)],
        )
        .unwrap();
        let mut base: Option<Vec<Option<Vec<f32>>>> = None;
        for c in [Checkpointing::None, Checkpointing::Selective, Checkpointing::Full] {
            let (loss, mut g) = forward_backward(&model, &b, c).unwrap();
            println!("{} loss {} want {:?}", name, loss.mean, get("lora.losses").to_vec1::<f32>().unwrap()[0]);
            let gs = tr.take_gradients(&mut g);
            let v: Vec<Option<Vec<f32>>> =
                gs.iter().map(|g| g.as_ref().map(|g| g.flatten_all().unwrap().to_vec1().unwrap())).collect();
            let mut worst = 0f64;
            for (n, g) in tr.names().iter().zip(&v) {
                let key = format!("lora.grad.{n}");
                match (golden.info(&key), g) {
                    (None, None) => println!("both none {n}"),
                    (Some(_), Some(g)) => {
                        let w = get(&key).flatten_all().unwrap().to_vec1::<f32>().unwrap();
                        let top = w.iter().fold(0f32, |m, v| m.max(v.abs()));
                        let e = w.iter().zip(g).fold(0f32, |m, (a, b)| m.max((a - b).abs()));
                        if top == 0. {
                            println!("zero {n} {e}")
                        } else {
                            worst = worst.max((e / top) as f64);
                        }
                    }
                    (a, b) => println!("MISMATCH {n} {} {}", a.is_some(), b.is_some()),
                }
            }
            println!("worst {worst:e}");
            if let Some(b) = &base {
                assert_eq!(b, &v);
            } else {
                base = Some(v);
            }
        }
    }
}
