//! Adapters made of adapters: several merged into one by every method, and one extracted from what it was merged into.

mod adapters_common;

use adapters_common::{deltas, fixture, mixed_adapter, options, run_ok, table, worst};
use std::collections::BTreeMap;
use std::path::Path;

#[test]
fn an_adapter_is_extracted_from_what_it_was_merged_into() {
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name).to_str().unwrap().to_string();
    let pipe = fixture("case_b/pipe").to_str().unwrap().to_string();
    let (adapter, merged, out) = (path("in.safetensors"), path("merged"), path("out.safetensors"));
    let table = table("case_b");
    mixed_adapter(Path::new(&adapter), &table);
    run_ok(["merge", &pipe, &adapter, "--out", &merged]);
    let report = run_ok(["extract", &pipe, &merged, "--rank", "5", "--out", &out, "--json"]);
    let report: serde_json::Value = serde_json::from_str(&report).unwrap();
    let names: Vec<&str> =
        report["modules"].as_array().unwrap().iter().map(|m| m["module"].as_str().unwrap()).collect();
    assert_eq!(names, ["img_in", "transformer_blocks.0.attn.to_q", "transformer_blocks.2.img_mlp.net.2"]);
    assert_eq!(report["not_extracted"].as_array().unwrap().len(), 0);
    let (want, got) = (deltas(Path::new(&adapter), &options(&table)), deltas(Path::new(&out), &options(&table)));
    assert!(worst(&got, &want) < 1e-5);
    // A rank too small loses what it says it loses.
    let small = path("small.safetensors");
    let report = run_ok(["extract", &pipe, &merged, "--rank", "2", "--out", &small, "--json"]);
    let report: serde_json::Value = serde_json::from_str(&report).unwrap();
    let lost = report["modules"][2]["energy_lost"].as_f64().unwrap();
    let name = "transformer_blocks.2.img_mlp.net.2";
    let mut rest = want[name].clone();
    rest.add_scaled(&deltas(Path::new(&small), &options(&table))[name], -1.0);
    assert!((rest.energy() / want[name].energy() - lost).abs() < 1e-4 && lost > 0.05, "{lost}");
}

/// All but the `keep` largest values set to zero.
fn trimmed(values: &[f64], keep: usize) -> Vec<f64> {
    let mut magnitudes: Vec<f64> = values.iter().map(|v| v.abs()).collect();
    magnitudes.sort_by(|x, y| y.total_cmp(x));
    values.iter().map(|v| if v.abs() >= magnitudes[keep - 1] { *v } else { 0.0 }).collect()
}

#[test]
fn every_method_merges_adapters_into_one_with_weights_of_either_sign() {
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name).to_str().unwrap().to_string();
    let table = table("case_b");
    let one = fixture("case_b/lora/kohya_lora_unet.safetensors").to_str().unwrap().to_string();
    let two = path("two.safetensors");
    mixed_adapter(Path::new(&two), &table);
    let weights = [0.8, -0.3];
    let given = [&one, &two].map(|p| deltas(Path::new(p), &options(&table)));
    // The changes of one module, by adapter, each at its weight, values in f64.
    let of = |name: &str| -> Vec<Vec<f64>> {
        let of_one = |(deltas, weight): (&BTreeMap<String, qwen_lora::adapters::matrix::Matrix>, f64)| {
            Some(deltas.get(name)?.data.iter().map(|v| f64::from(*v) * weight).collect())
        };
        given.iter().zip(weights).filter_map(of_one).collect()
    };
    let sum =
        |parts: &[Vec<f64>]| -> Vec<f64> { (0..parts[0].len()).map(|i| parts.iter().map(|p| p[i]).sum()).collect() };
    let half = |parts: Vec<Vec<f64>>| -> Vec<Vec<f64>> {
        parts.iter().map(|p| trimmed(p, (p.len() as f64 * 0.5).round() as usize)).collect()
    };
    let elected = |parts: &[Vec<f64>]| -> Vec<f64> {
        let one = |i: usize| {
            let positive = parts.iter().map(|p| p[i]).sum::<f64>() >= 0.0;
            let agree: Vec<f64> = parts.iter().map(|p| p[i]).filter(|v| *v != 0.0 && (*v > 0.0) == positive).collect();
            agree.iter().sum::<f64>() / agree.len().max(1) as f64
        };
        (0..parts[0].len()).map(one).collect()
    };
    let merge = |name: &str, args: &[&str]| {
        let out = path(&format!("{name}.safetensors"));
        let args = [&["merge", "--into-adapter", &one, &two, "--weights", "0.8,-0.3", "--json", "--out", &out], args];
        let report: serde_json::Value = serde_json::from_str(&run_ok(args.concat())).unwrap();
        let lost = |m: &serde_json::Value| m["energy_lost"].as_f64().unwrap();
        let lost = report["modules"].as_array().unwrap().iter().map(lost).fold(0.0, f64::max);
        (deltas(Path::new(&out), &options(&table)), lost)
    };
    // 40 is as many as the narrowest module has: nothing is lost.
    let full = ["--rank", "40", "--method"];
    type ByHand<'a> = &'a dyn Fn(Vec<Vec<f64>>) -> Vec<f64>;
    let cases: [(&str, Vec<&str>, ByHand); 6] = [
        ("concat", vec![], &|p| sum(&p)),
        ("svd", [&full[..], &["svd"]].concat(), &|p| sum(&p)),
        ("linear", vec!["--method", "linear"], &|p| sum(&p).iter().map(|v| v / 0.5).collect()),
        ("magnitude_prune", [&full[..], &["magnitude_prune"]].concat(), &|p| sum(&half(p))),
        ("ties", [&full[..], &["ties"]].concat(), &|p| elected(&half(p))),
        ("dare", [&full[..], &["dare", "--density", "1"]].concat(), &|p| sum(&p)),
    ];
    for (name, args, by_hand) in cases {
        let (got, lost) = merge(name, &args);
        assert!(lost < 1e-6, "{name} loses {lost}");
        assert_eq!(got.len(), given[0].len() + 1, "img_in is in the second only");
        for (module, got) in got {
            let want = by_hand(of(&module));
            let largest = want.iter().fold(0f64, |m, v| m.max(v.abs()));
            for (i, (got, want)) in got.data.iter().zip(&want).enumerate() {
                assert!((f64::from(*got) - want).abs() <= 2e-5 * largest, "{name} {module}[{i}]: {got} {want}");
            }
        }
    }
    // What dare keeps is scaled up; the same seed keeps the same.
    let (dare, _) = merge("dare_half", &[&full[..], &["dare", "--density", "0.25", "--seed", "3"]].concat());
    let (again, _) = merge("dare_again", &[&full[..], &["dare", "--density", "0.25", "--seed", "3"]].concat());
    let module = "transformer_blocks.1.attn.to_k";
    let (mut kept, whole) = (0, &of(module)[0]);
    for (got, want) in dare[module].data.iter().zip(whole) {
        let got = f64::from(*got);
        kept += usize::from((got - 4.0 * want).abs() < 1e-5);
        assert!(got.abs() < 1e-5 || (got - 4.0 * want).abs() < 1e-5, "{got} {want}");
    }
    assert!((0.15..0.35).contains(&(kept as f64 / whole.len() as f64)), "{kept} of {}", whole.len());
    assert_eq!(dare[module].data, again[module].data);
    // A rank too small loses what it says.
    let (small, lost) = merge("small", &["--method", "svd", "--rank", "2"]);
    let shares = small.iter().map(|(module, got)| {
        let want = sum(&of(module));
        let rest: f64 = want.iter().zip(&got.data).map(|(w, g)| (w - f64::from(*g)).powi(2)).sum();
        rest / want.iter().map(|w| w * w).sum::<f64>()
    });
    let worst = shares.fold(0.0, f64::max);
    assert!(lost > 0.01 && (worst - lost).abs() < 1e-4, "{worst} {lost}");
}
