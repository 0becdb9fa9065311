//! `qwen-lora generate` as a user runs it, on the tiny synthetic pipeline.

use candle_core::{DType, Device, Tensor};
use qwen_lora::adapters::file::{Provenance, write_exported};
use qwen_lora::adapters::{LoraAdapter, LoraModule};
use qwen_lora::rng::{Purpose, Stream};
use std::path::Path;
use std::process::{Command, Output};

fn generate(dir: &Path, args: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_qwen-lora"))
        .arg("generate")
        .args(args)
        .current_dir(dir)
        .output()
        .expect("the binary was built for this test")
}

/// A successful run on `synthetic:tiny` with few steps, with its JSON.
fn tiny(dir: &Path, args: &[&str]) -> serde_json::Value {
    let base = ["--model", "synthetic:tiny", "--steps", "2", "--size", "48x32", "--json", "--quiet"];
    let output = generate(dir, &[&base[..], args].concat());
    assert!(output.status.success(), "{args:?}: {}", String::from_utf8_lossy(&output.stderr));
    serde_json::from_slice(&output.stdout).unwrap()
}

fn bytes(dir: &Path, name: &str) -> Vec<u8> {
    std::fs::read(dir.join(name)).unwrap_or_else(|e| panic!("{name}: {e}"))
}

fn pixels(dir: &Path, name: &str) -> Vec<u8> {
    image::load_from_memory(&bytes(dir, name)).unwrap().to_rgb8().into_raw()
}

/// An exported adapter of rank 2 with a strong effect on a few of the tiny model's linears.
fn write_adapter(path: &Path, seed: u64, modules: &[&str]) {
    let tensor = |name: &str, shape: (usize, usize)| {
        let values = Stream::named(seed, name, Purpose::Bench).normals(shape.0 * shape.1, 0.5);
        Tensor::from_vec(values, shape, &Device::Cpu).unwrap()
    };
    let module = |name: &&str| {
        let (a, b) = (tensor(&format!("{name}.a"), (2, 64)), tensor(&format!("{name}.b"), (64, 2)));
        (name.to_string(), LoraModule { a, b, alpha: 2.0, scale: 1.0 })
    };
    let adapter = LoraAdapter { modules: modules.iter().map(module).collect() };
    write_exported(path, &adapter, DType::F32, &Provenance::default()).unwrap();
}

const MODULES: [&str; 2] = ["transformer_blocks.0.attn.to_q", "transformer_blocks.1.attn.to_out.0"];

#[test]
fn an_image_depends_on_its_seed_and_prompt_and_not_on_its_company() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    let prompts = ["--prompt", "a cat", "--prompt", "三只很长的红色的狗 in a boat on the sea"];
    tiny(dir, &[&prompts[..], &["--seeds", "7,8", "--output", "all", "--batch-size", "4"]].concat());
    tiny(dir, &[&prompts[..2], &["--seed", "8", "--output", "one.png"]].concat());
    assert_eq!(bytes(dir, "one.png"), bytes(dir, "all/001-8.png"));
    let names = ["all/001-7.png", "all/001-8.png", "all/002-7.png", "all/002-8.png"];
    for (i, a) in names.iter().enumerate() {
        assert_eq!(image::open(dir.join(a)).unwrap().to_rgb8().dimensions(), (48, 32));
        assert!(names[..i].iter().all(|b| pixels(dir, a) != pixels(dir, b)), "{a}");
    }
    // The negative prompt and the guidance scale count; without guidance the negative prompt does not.
    let made = |name: &str, args: &[&str]| {
        tiny(dir, &[&prompts[..2], &["--seed", "8", "--output", name], args].concat());
        pixels(dir, name)
    };
    assert_ne!(made("n.png", &["--negative-prompt", "blurry"]), pixels(dir, "one.png"));
    assert_ne!(made("g.png", &["--guidance", "2"]), pixels(dir, "one.png"));
    assert_eq!(
        made("g1.png", &["--guidance", "1"]),
        made("g2.png", &["--guidance", "1", "--negative-prompt", "blurry"])
    );
}

#[test]
fn an_image_is_made_again_from_itself_byte_for_byte() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    write_adapter(&dir.join("a.safetensors"), 1, &MODULES);
    write_adapter(&dir.join("b.safetensors"), 2, &MODULES[..1]);
    let loras = ["--lora", "a.safetensors:0.7", "--lora", "b.safetensors"];
    let sweep = ["--prompt", "一只\"猫\"", "--seeds", "3", "--strengths", "0,0.3,1", "--output", "sweep"];
    let json = tiny(dir, &[&loras[..], &sweep].concat());
    assert_eq!(json["images"].as_array().unwrap().len(), 3);
    assert_eq!(json["images"][1]["strength"], 0.3);
    for name in ["001-3-x0.png", "001-3-x0.3.png", "001-3-x1.png"] {
        let output = generate(dir, &["--from", &format!("sweep/{name}"), "--output", name, "--quiet"]);
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        assert_eq!(bytes(dir, name), bytes(dir, &format!("sweep/{name}")), "{name}");
    }
    let output = generate(dir, &["--from", "sweep/grid.png", "--output", "again", "--quiet"]);
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    assert_eq!(bytes(dir, "again/grid.png"), bytes(dir, "sweep/grid.png"));

    // Strength 0 is the base model, and both adapters count.
    tiny(dir, &["--prompt", "一只\"猫\"", "--seed", "3", "--output", "base.png"]);
    tiny(dir, &["--prompt", "一只\"猫\"", "--seed", "3", "--lora", "a.safetensors:0.7", "--output", "a.png"]);
    assert_eq!(pixels(dir, "base.png"), pixels(dir, "sweep/001-3-x0.png"));
    assert_ne!(pixels(dir, "a.png"), pixels(dir, "sweep/001-3-x1.png"));
    assert_ne!(pixels(dir, "a.png"), pixels(dir, "base.png"));

    // An adapter that has changed since is not passed off as the old one.
    write_adapter(&dir.join("b.safetensors"), 3, &MODULES[..1]);
    let output = generate(dir, &["--from", "sweep/001-3-x1.png", "--output", "other.png"]);
    assert_eq!(output.status.code(), Some(2));
    assert!(String::from_utf8_lossy(&output.stderr).contains("is not the adapter that the image was made with"));
}

#[test]
fn prompts_come_from_a_file_too() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    std::fs::write(dir.join("prompts.txt"), "\u{feff}a cat\r\n\n  a dog  \n").unwrap();
    let json = tiny(dir, &["--prompt-file", "prompts.txt", "--grid"]);
    assert_eq!(json["recipe"]["prompts"], serde_json::json!(["a cat", "a dog"]));
    assert_eq!(json["images"][1]["path"], "generated/002-0.png");
    assert!(dir.join("generated/grid.png").is_file());
}

#[test]
fn bad_input_is_one_clear_error_and_writes_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    std::fs::write(dir.join("empty.txt"), "\n \n").unwrap();
    write_adapter(&dir.join("style.safetensors"), 1, &MODULES);
    write_adapter(&dir.join("other.safetensors"), 1, &["transformer_blocks.9.attn.to_q"]);
    image::RgbImage::new(4, 4).save(dir.join("plain.png")).unwrap();
    std::fs::write(dir.join("there.png"), "x").unwrap();
    let cases: &[(&[&str], &[&str])] = &[
        (&[], &["there is no prompt"]),
        (&["--prompt-file", "empty.txt"], &["`empty.txt` is empty"]),
        (&["--prompt-file", "none.txt"], &["none.txt"]),
        (&["--prompt", "a", "--size", "100x64"], &["multiples of 16", "nearest size is 96x64"]),
        (&["--prompt", "a", "--size", "16:10"], &["`16:10`", "aspect ratio is `3:2`"]),
        (&["--prompt", "a", "--steps", "0"], &["steps", "found 0"]),
        (&["--prompt", "a", "--guidance", "0.5"], &["guidance", "found 0.5"]),
        (
            &["--prompt", "a", "--lora", "styl.safetensors:0.5"],
            &["no adapter at `styl.safetensors`", "`style.safetensors`"],
        ),
        (&["--prompt", "a", "--lora", "other.safetensors"], &["other.safetensors", "transformer_blocks.9"]),
        (&["--prompt", "a", "--lora", "plain.png"], &["plain.png"]),
        (&["--prompt", "a", "--lora", "style.safetensors:nan"], &["strength", "NaN"]),
        (&["--prompt", "a", "--strengths", "0,1"], &["`--strengths`", "hint"]),
        (&["--from", "plain.png"], &["holds no recipe"]),
        (&["--from", "empty.txt"], &["not a whole PNG"]),
        (&["--prompt", "a", "--output", "there.png"], &["there already", "`--overwrite`"]),
        (&["--prompt", "a", "--seeds", "1,2", "--output", "x.png"], &["is one file", "2 images"]),
        (&["--prompt", "a", "--seeds", "1,1"], &["two images"]),
        (&["--prompt", "a", "--model", "nowhere/to/be/found"], &["no model at"]),
    ];
    for (args, words) in cases {
        let model: &[&str] = if args.contains(&"--model") { &[] } else { &["--model", "synthetic:tiny"] };
        let output = generate(dir, &[model, args].concat());
        let error = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(2), "{args:?}: {error}");
        assert!(words.iter().all(|word| error.contains(word)), "{args:?}: {error}");
    }
    let mut left: Vec<_> = std::fs::read_dir(dir).unwrap().map(|e| e.unwrap().file_name()).collect();
    left.sort();
    assert_eq!(left, ["empty.txt", "other.safetensors", "plain.png", "style.safetensors", "there.png"]);
}

#[test]
fn each_prompt_of_a_batch_gets_the_adapters_that_its_words_call_for() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    write_adapter(&dir.join("ink.safetensors"), 1, &MODULES);
    write_adapter(&dir.join("anime.safetensors"), 2, &MODULES[..1]);
    let routes = "adapters:\n\
        - {file: ink.safetensors, triggers: [水墨, ink wash], weight: 0.6}\n\
        - {file: anime.safetensors, triggers: [动漫, anime]}\n";
    std::fs::write(dir.join("routes.yaml"), routes).unwrap();
    let prompts = ["--prompt", "水墨猫", "--prompt", "a cat", "--prompt", "anime cat <lora:ink:-0.3>"];
    let auto = ["--auto-lora", "routes.yaml", "--seed", "8", "--batch-size", "3", "--output", "all", "--grid"];
    let json = tiny(dir, &[&prompts[..], &auto].concat());
    assert_eq!(json["recipe"]["prompts"][2], "anime cat");
    assert_eq!(json["recipe"]["routed"][1], serde_json::json!([]));
    let single = |name: &str, args: &[&str]| {
        tiny(dir, &[args, &["--seed", "8", "--output", name]].concat());
        bytes(dir, name)
    };
    let one = single("1.png", &["--prompt", "水墨猫", "--lora", "./ink.safetensors:0.6"]);
    let pixels_of = |png: &[u8]| image::load_from_memory(png).unwrap().to_rgb8().into_raw();
    assert_eq!(pixels_of(&one), pixels(dir, "all/001-8.png"));
    assert_eq!(single("2.png", &["--prompt", "a cat"]), bytes(dir, "all/002-8.png"));
    let three = ["--prompt", "anime cat", "--lora", "anime.safetensors:0.8", "--lora", "ink.safetensors:-0.3"];
    assert_eq!(pixels_of(&single("3.png", &three)), pixels(dir, "all/003-8.png"));
    assert_ne!(pixels(dir, "all/003-8.png"), pixels(dir, "all/002-8.png"));
    // Each image and the grid can be made again without the routes file.
    std::fs::remove_file(dir.join("routes.yaml")).unwrap();
    for args in [
        &["--from", "all/003-8.png", "--output", "again.png"][..],
        &["--from", "all/grid.png", "--output", "again", "--grid"],
    ] {
        let made = generate(dir, &[args, &["--quiet"]].concat());
        assert!(made.status.success(), "{}", String::from_utf8_lossy(&made.stderr));
    }
    assert_eq!(bytes(dir, "again.png"), bytes(dir, "all/003-8.png"));
    assert_eq!(bytes(dir, "again/grid.png"), bytes(dir, "all/grid.png"));
}

#[test]
fn routes_are_explained_and_an_adapter_for_another_base_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    write_adapter(&dir.join("ink.safetensors"), 1, &MODULES);
    let route = |args: &[&str]| {
        let command = Command::new(env!("CARGO_BIN_EXE_qwen-lora")).arg("route").args(args).current_dir(dir).output();
        let output = command.unwrap();
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        (output.status.code(), text(&output.stdout), text(&output.stderr))
    };
    std::fs::write(
        dir.join("routes.yaml"),
        "adapters: [{file: ink.safetensors, triggers: [水墨], base: '0123456789'}]",
    )
    .unwrap();
    let (code, out, _) = route(&["--auto-lora", "routes.yaml", "--explain", "水墨，一只猫", "--explain", "a cat"]);
    assert_eq!(code, Some(0));
    assert!(out.contains("ink  weight 0.8 (score 1; found 水墨)"), "{out}");
    assert!(out.contains("ink  no: below the threshold (score 0)"), "{out}");
    let (_, out, _) = route(&["--auto-lora", "routes.yaml", "--explain", "水墨", "--json"]);
    let json: serde_json::Value = serde_json::from_str(&out).unwrap();
    assert_eq!(
        json["decisions"][0]["candidates"][0]["verdict"],
        serde_json::json!({"is": "taken", "of": {"weight": 0.8}})
    );
    let model = ["--auto-lora", "routes.yaml", "--explain", "水墨", "--model", "synthetic:tiny"];
    let (code, _, err) = route(&model);
    assert!(code == Some(2) && err.contains("`ink` was made for another base model"), "{err}");
    let prompt = ["--model", "synthetic:tiny", "--prompt", "水墨", "--auto-lora", "routes.yaml", "--steps", "1"];
    let output = generate(dir, &prompt);
    assert_eq!(output.status.code(), Some(2));
    assert!(String::from_utf8_lossy(&output.stderr).contains("`ink` was made for another base model"));
    // Only adapters that a prompt takes matter.
    assert_eq!(route(&["--auto-lora", "routes.yaml", "--explain", "a cat", "--model", "synthetic:tiny"]).0, Some(0));
    std::fs::remove_file(dir.join("ink.safetensors")).unwrap();
    let (code, _, err) = route(&model);
    assert!(code == Some(2) && err.contains("no adapter at `ink.safetensors`"), "{err}");
}
