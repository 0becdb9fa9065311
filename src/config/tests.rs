use super::*;

const MINIMAL: &str = "model: synthetic:tiny\ndata: {path: images}\n";

fn parse(text: &str) -> Result<Config> {
    Config::parse(text, Path::new("dir/a.yaml"), &[])
}

fn with(sets: &[&str]) -> Result<Config> {
    let sets: Vec<String> = sets.iter().map(|s| s.to_string()).collect();
    Config::parse(MINIMAL, Path::new("dir/a.yaml"), &sets)
}

fn refused(text: &str) -> String {
    let error = parse(text).expect_err(text);
    assert_eq!(error.exit_code(), 2);
    error.to_string()
}

#[test]
fn a_minimal_file_gets_the_defaults() {
    let config = parse(MINIMAL).unwrap();
    let expected = Config {
        model: Model { path: "synthetic:tiny".into(), ..Default::default() },
        output: "runs/a".into(),
        data: Data { path: "images".into(), ..Default::default() },
        ..Default::default()
    };
    assert_eq!(config, expected);
    assert_eq!(config.cache_dir(), Path::new("runs/.cache"));
}

#[test]
fn the_recipe_keeps_its_values() {
    let recipe = r#"
training: {batch_size: 8, learning_rate: 1e-5, lr_scheduler: cosine_with_warmup, warmup_steps: 200, max_steps: 5000}
lora: {rank: 64, alpha: 128, target_modules: ["qkv", "mlp", "fusion"]}
data: {resolution: 768, caption_weight: 1.2, pose_loss_weight: 0.8}
"#;
    let text = format!("model: Qwen/Qwen-Image\n{}", recipe.replace("data: {", "data: {path: images/, "));
    for config in [parse(&text).unwrap(), Config::load(Path::new("configs/anime.yaml"), &[]).unwrap()] {
        let Config { training, lora, data, .. } = &config;
        assert_eq!((training.batch_size, training.learning_rate), (8, 1e-5));
        assert_eq!((training.warmup_steps, training.max_steps), (200, 5000));
        assert_eq!(training.lr_scheduler, LrSchedule::CosineWithWarmup);
        assert_eq!((lora.rank.get(), lora.alpha, lora.scale(lora.rank, lora.alpha)), (64, 128.0, 2.0));
        assert_eq!(lora.target_modules, Targets::new(&["qkv", "mlp", "fusion"]));
        assert_eq!((data.resolution.sides(), data.caption_weight, data.pose_loss_weight), (&[768][..], 1.2, 0.8));
        let weights = &config.loss.weights;
        assert_eq!((weights.reconstruction, weights.pose, weights.count), (0.7, 0.2, 0.1));
        config.check_supported().unwrap();
    }
}

#[test]
fn every_file_under_configs_is_valid_and_trains() {
    let mut num_files = 0;
    for entry in std::fs::read_dir("configs").unwrap() {
        let path = entry.unwrap().path();
        let config = Config::load(&path, &[]).unwrap();
        config.check_supported().unwrap();
        let stem = path.file_stem().unwrap().to_str().unwrap();
        assert_eq!(config.output, Path::new("runs").join(stem));
        num_files += 1;
    }
    assert!(num_files >= 4);
}

#[test]
fn unknown_keys_are_named_with_their_place_and_the_nearest_key() {
    let text = refused("model: m\ntraining:\n  batch_size: 1\n  learning_rte: 1e-4\ndata: {path: x}\n");
    assert_eq!(
        text,
        "unknown key `training.learning_rte` in `dir/a.yaml`, line 4, column 3\n  \
         the nearest known key is `training.learning_rate`"
    );
    let text = refused("model: m\ntrainning: {batch_size: 1}\ndata: {path: x}\n");
    assert!(text.contains("unknown key `trainning`") && text.contains("is `training`"), "{text}");
    let text = refused("model: m\ntraining: {caption_dropout: 0.1}\ndata: {path: x}\n");
    assert!(text.contains("a key of this name stands elsewhere: `data.caption_dropout`"), "{text}");
    let text = refused("model: m\nsave: {zzz: 1}\ndata: {path: x}\n");
    assert!(text.contains("known here: every, keep, dtype"), "{text}");
    let text = refused("model: m\nlora: {target_modules: [qkv, {name: mlp, rnk: 4}]}\ndata: {path: x}\n");
    assert!(text.contains("unknown key `lora.target_modules.1.rnk`") && text.contains("1.rank`"), "{text}");
    let text = with(&["training.max_step=10"]).unwrap_err().to_string();
    assert_eq!(
        text,
        "unknown key `training.max_step` in `--set training.max_step=10`\n  \
         the nearest known key is `training.max_steps`"
    );
}

#[test]
fn wrong_types_and_values_out_of_range_name_key_place_found_and_expected() {
    for (set, expected, found) in [
        ("lora.rank=0", "a whole number from 1 to 3072", "0"),
        ("lora.rank=3.5", "a whole number from 1 to 3072", "3.5"),
        ("lora.alpha=0", "a number above 0", "0"),
        ("lora.target_modules=[]", "a list of names, or of maps {name, rank, alpha}", "a list of 0"),
        ("lora.target_modules=qkv", "a list of names, or of maps {name, rank, alpha}", "the text `qkv`"),
        ("training.learning_rate=-1e-4", "a number from 0 to 1", "-0.0001"),
        ("training.learning_rate=fast", "a number from 0 to 1", "the text `fast`"),
        ("training.batch_size=0", "a whole number of 1 or more", "0"),
        ("training.batch_size=-1", "a whole number of 1 or more", "-1"),
        ("training.warmup_steps=-1", "a whole number of 0 or more", "-1"),
        ("training.max_steps=1e3", "a whole number of 1 or more", "1000.0"),
        ("training.betas=[0.9]", "a list of two numbers from 0 to below 1", "[0.9]"),
        ("training.betas=[0.9, 1.0]", "a list of two numbers from 0 to below 1", "[0.9, 1.0]"),
        ("training.optimizer=adam", "`adamw`", "the text `adam`"),
        ("data.resolution=0", "a whole number from 16 to 8192, or a list of different ones", "0"),
        ("data.resolution=[]", "a whole number from 16 to 8192, or a list of different ones", "a list of 0"),
        ("data.resolution=[512, 512]", "a whole number from 16 to 8192, or a list of different ones", "a list of 2"),
        ("data.held_out=1.5", "a number of images, or a share of them between 0 and 1", "1.5"),
        ("data.caption_dropout=2", "a number from 0 to 1", "2"),
        ("data.pose_loss_weight=-1", "a number of 0 or more", "-1"),
        ("data.default_caption=7", "text or null", "7"),
        ("flow.shift=0", "`dynamic` or `none` or a number above 0", "0"),
        ("flow.shift=dynamc", "`dynamic` or `none` or a number above 0", "the text `dynamc`"),
        ("device=gpu", "`auto` or `cpu` or `cuda:N`", "the text `gpu`"),
        ("seed=-1", "a whole number of 0 or more", "-1"),
        ("model.offline=no", "true or false", "the text `no`"),
        ("data=images", "a map", "the text `images`"),
    ] {
        let error = with(&[set]).expect_err(set);
        let (key, _) = set.split_once('=').unwrap();
        let text = error.to_string();
        assert!(text.starts_with(&format!("wrong value for `{key}")), "{text}");
        assert!(text.contains(&format!("in `--set {set}`\n  expected {expected}, found {found}")), "{set}: {text}");
        assert_eq!(error.exit_code(), 2);
    }
    let text = refused("model: m\nlora:\n  rank: 0\ndata: {path: x}\n");
    assert!(text.starts_with("wrong value for `lora.rank` in `dir/a.yaml`, line 3, column 9\n"), "{text}");
    let text = refused("model: m\ndata: {path: x, resolution: [512, 8]}\n");
    assert!(text.contains("`data.resolution.1` in `dir/a.yaml`, line 2, column 35"), "{text}");
    let text = with(&["training.checkpointing=selectve"]).unwrap_err().to_string();
    assert!(text.ends_with("hint: did you mean `selective`?"), "{text}");
    assert!(refused("- a\n").contains("expected a map, found a list of 1"));
}

#[test]
fn what_is_missing_is_named() {
    for (text, key) in [("data: {path: x}\n", "model.path"), ("model: m\n", "data.path"), ("", "model.path")] {
        let error = refused(text);
        assert!(error.starts_with(&format!("`{key}` is missing in `dir/a.yaml`\n")), "{error}");
    }
    let error = Config::load(Path::new("nowhere.yaml"), &[]).unwrap_err();
    assert!(error.to_string().starts_with("cannot read the config file `nowhere.yaml`"));
    assert_eq!(error.exit_code(), 2);
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("latin1.yaml");
    std::fs::write(&path, b"model: caf\xe9\n").unwrap();
    let error = Config::load(&path, &[]).unwrap_err().to_string();
    assert!(error.contains("is not UTF-8") && error.contains("offset 10"), "{error}");
}

#[test]
fn rules_between_keys() {
    for (sets, says) in [
        (&["training.max_steps=10", "training.warmup_steps=11"][..], "longer than the run"),
        (&["flow.sigma_min=0.5", "flow.sigma_max=0.5"], "the range of noise levels is empty"),
        (&["data.caption_weight=0", "data.caption_dropout=0"], "every sample would have weight 0"),
    ] {
        let error = with(sets).unwrap_err().to_string();
        assert!(error.contains(says), "{error}");
    }
}

#[test]
#[cfg(not(feature = "cuda"))]
fn cuda_without_its_feature_is_refused_not_ignored() {
    let error = with(&["device=cuda:1"]).unwrap().check_supported().unwrap_err().to_string();
    assert!(error.contains("cuda:1") && error.contains("--features cuda"), "{error}");
}

#[test]
fn stages_cover_the_run_without_gap_or_overlap() {
    let with_stages = |stages: &str| with(&["training.max_steps=100", &format!("stages={stages}")]);
    let config = with_stages("[{name: a, until: 10}, {name: b, until: 0.45, sigma: [0, 0.5]}, {name: c}]").unwrap();
    let spans = config.stages.spans(100).unwrap();
    let steps: Vec<_> = spans.iter().map(|(steps, stage)| (steps.clone(), stage.name.as_str())).collect();
    assert_eq!(steps, [(0..10, "a"), (10..45, "b"), (45..100, "c")]);
    assert_eq!(with_stages("[{name: a, until: 1.0}]").unwrap().stages.spans(100).unwrap()[0].0, 0..100);
    let preset = with_stages("progressive").unwrap();
    let steps: Vec<_> =
        preset.stages.spans(100).unwrap().into_iter().map(|(steps, stage)| (steps, &stage.name)).collect();
    assert_eq!(steps, [(0..40, &"global".into()), (40..70, &"limbs".into()), (70..100, &"hands".into())]);
    assert!(preset.to_yaml().contains("stages: progressive\n"));
    assert_eq!(parse("model: m\ndata: {path: x}\nstages:\n").unwrap().stages, Stages::default());
    for (stages, says) in [
        ("[{name: a, until: 10}, {name: b, until: 90}]", "no stage covers the steps after 90, up to 100"),
        (
            "[{name: a, until: 50}, {name: b, until: 40}, {name: c}]",
            "`b` has no steps: it ends after step 40\n  the stage before it, `a`, ends after step 50",
        ),
        ("[{name: a}, {name: b}]", "`b` has no steps"),
        ("[{name: a, until: 0.001}, {name: b}]", "`a` has no steps: it ends after step 0"),
        (
            "[{name: a, until: 101}]",
            "`a` ends after the run\n  expected `until` of at most `training.max_steps`, 100, found 101",
        ),
        ("[{name: a, until: 10}, {name: a}]", "two stages are called `a`"),
        ("[{name: ' '}]", "`stages.0.name` is empty"),
        ("[{until: 3}]", "`stages.0.name` is missing"),
        ("[{name: a, untl: 3}]", "unknown key `stages.0.untl`"),
        ("[{name: a, until: 0}]", "wrong value for `stages.0.until`"),
        ("[{name: a, until: 1.5}]", "wrong value for `stages.0.until`"),
        (
            "[{name: a, loss: {reconstruction: 0, pose: 0, count: 0}}]",
            "the weights of the loss are all 0 in the stage `a`",
        ),
        ("[{name: a, loss: {pose: -1}}]", "wrong value for `stages.0.loss.pose`"),
        ("[{name: a, sigma: [0.5, 0.5]}]", "wrong value for `stages.0.sigma`"),
        ("three", "wrong value for `stages`"),
    ] {
        let error = with_stages(stages).expect_err(stages);
        assert!(error.to_string().contains(says), "{error}");
        assert_eq!(error.exit_code(), 2);
    }
}

#[test]
fn alpha_and_targets_follow_the_section_unless_given() {
    assert_eq!(with(&["lora.rank=64"]).unwrap().lora.alpha, 64.0);
    assert_eq!(with(&["lora.alpha=4"]).unwrap().lora.alpha, 4.0);
    let config =
        with(&["lora={rank: 8, alpha: 4, target_modules: [qkv, {name: mlp, rank: 32}, {name: entry, alpha: 1}]}"]);
    let lora = config.unwrap().lora;
    let resolved: Vec<_> = lora.target_modules.entries().iter().map(|t| lora.rank_and_alpha(t)).collect();
    let rank = |n| Rank::new(n).unwrap();
    assert_eq!(resolved, [(rank(8), 4.0), (rank(32), 4.0), (rank(8), 1.0)]);
    let lora = with(&["lora.rslora=true", "lora.rank=16", "lora.target_modules.2.rank=4"]).unwrap_err();
    assert!(lora.to_string().contains("`lora.target_modules`"), "a list that the file does not have: {lora}");
    let config = Config::load(Path::new("configs/anime.yaml"), &["lora.target_modules.1.rank=4".into()]).unwrap();
    assert_eq!(config.lora.target_modules.entries()[1].rank, Some(rank(4)));
    assert_eq!(config.lora.target_modules.entries()[1].name, "mlp");
    assert_eq!(Lora { rslora: true, ..Default::default() }.scale(rank(16), 8.0), 2.0);
}

/// A config without a single default value.
fn unusual() -> Config {
    with(&[
        "model={path: /m/qwen, revision: '0123', dtype: bf16, modulation: streamed, blocks_to_swap: 9, offline: true, transformer: /t/a b.safetensors, vae: v, \
         text_encoder: 'null'}",
        "output=/runs/第一, #1",
        "seed=18446744073709551615",
        "device=cuda:3",
        "training={batch_size: 3, gradient_accumulation: 2, learning_rate: 1.23456789e-7, lr_scheduler: linear, \
         warmup_steps: 3, max_steps: 77, betas: [0.5, 0.95], eps: 1e-6, weight_decay: 0, max_grad_norm: 0, dtype: f32, \
         checkpointing: selective, memory: 16GiB, mode: full}",
        "lora={rank: 3, alpha: 0.1, rslora: true, init: kaiming, target_modules: ['re:^a\\.\"b', {name: '*', rank: 2}]}",
        "data={path: /d/图片, resolution: [512, 768], default_caption: 'yes', max_sequence_length: 99, \
         caption_dropout: 0.5, caption_weight: 0.3, pose_loss_weight: 2, held_out: 7, prefetch: 9, cache_dir: ~/c, \
         filter: {min_size: 7, max_hands: 4, max_legs: 3, require_person: true}, masks: ~/m}",
        "loss={weights: {reconstruction: 1, pose: 3, count: 0}, gate: {from: 0.2, to: 0.3, taper: 0}, every: 4, crop: 128, \
         decoder: /t/taew2_1.pth}",
        "pose={network: /n/net.safetensors, body: b/c, hand: h.pth}",
        "regions={person: 0.5, limbs: 3, hands: 6, gamma: 1, floor: 0.1}",
        "flow={sampling: uniform, logit_mean: -0.5, logit_std: 2, shift: 2.2255, sigma_min: 0.01, sigma_max: 0.99, \
         weighting: bell}",
        "save={every: 1, keep: 0, dtype: f16}",
        "stages=[{name: a, until: 0.25, learning_rate: 0.5, target_modules: [qkv, 're:x'], sigma: [0.1, 0.9], \
         resolution: [64, 80], loss: {reconstruction: 1, pose: 0, count: 0.5}, filter: {paths: ['h/*'], captions: [手], min_hands: 1, require_person: true}}, {name: b, until: 30}, {name: c}]",
        "evaluation={every: 0, num_sigmas: 9}",
        "preview={every: 7, prompts: [一只猫, 'yes'], negative_prompt: '', seeds: [3, 4], steps: 5, size: 16:9, guidance: 1.5}",
    ])
    .unwrap()
}

#[test]
fn the_resolved_file_parses_back_to_itself() {
    for config in [parse(MINIMAL).unwrap(), unusual()] {
        let yaml = config.to_yaml();
        assert_eq!(yaml, config.to_yaml());
        assert_eq!(Config::parse(&yaml, Path::new("config.yaml"), &[]).unwrap(), config, "{yaml}");
        let json = serde_json::to_string(&config.write()).unwrap();
        assert_eq!(Config::parse(&json, Path::new("config.yaml"), &[]).unwrap(), config, "{json}");
    }
    for (key, default) in reference::keys().iter().filter_map(|k| Some((k, default_of(k)?))) {
        let unusual = lookup(&unusual().write(), key);
        // `optimizer` has one value only.
        assert!(unusual != default || key == "training.optimizer", "{key} is the default");
    }
}

fn default_of(key: &str) -> Option<String> {
    let root = parse(MINIMAL).unwrap().write();
    let node = lookup_node(&root, key);
    (!matches!(node.content, tree::Content::Map(_))).then(|| node.inline())
}

fn lookup(root: &Node, key: &str) -> String {
    lookup_node(root, key).inline()
}

fn lookup_node<'a>(root: &'a Node, key: &str) -> &'a Node {
    key.split('.').fold(root, |node, step| node.get(step).unwrap())
}

#[test]
fn the_embedded_config_holds_no_path_and_sorted_keys() {
    let json = unusual().embedded_json();
    for path in ["/m/", "/t/", "/d/", "~/m", "/runs", "~/c", "cuda", "cache_dir"] {
        assert!(!json.contains(path), "{path} in {json}");
    }
    for kept in [r#""path":"qwen""#, r#""path":"图片""#, r#""transformer":"a b.safetensors""#, r#""max_steps":77"#] {
        assert!(json.contains(kept), "{kept} not in {json}");
    }
    assert!(json.starts_with(r#"{"data":{"#), "{json}");
    let moved = with(&["output=elsewhere", "device=cpu", "data.path=/other/place/images", "data.cache_dir=c"]).unwrap();
    assert_eq!(moved.embedded_json(), parse(MINIMAL).unwrap().embedded_json());
    assert!(Config::load(Path::new("configs/anime.yaml"), &[]).unwrap().embedded_json().contains("Qwen/Qwen-Image"));
}

#[test]
fn a_resumed_run_may_change_what_does_not_reach_the_weights() {
    let saved = parse(MINIMAL).unwrap();
    let same = with(&[
        "output=o",
        "device=cpu",
        "save={every: 1, keep: 1, dtype: bf16}",
        "evaluation.every=1",
        "data.prefetch=5",
        "data.cache_dir=c",
        "data.path=/moved/images",
        "model.offline=true",
    ]);
    assert_eq!(same.unwrap().differences(&saved), Vec::<String>::new());
    let other =
        with(&["training.max_steps=10", "lora.rank=4", "data.path=others", "lora.target_modules=[qkv]"]).unwrap();
    assert_eq!(
        other.differences(&saved),
        [
            "training.max_steps: 2000 -> 10",
            "lora.rank: 16 -> 4",
            "lora.alpha: 16.0 -> 4.0",
            "lora.target_modules: [qkv, mlp, fusion] -> [qkv]",
            "data.path: images -> others",
        ]
    );
}

#[test]
fn the_keys_that_may_change_exist() {
    let keys = reference::keys();
    for key in MAY_CHANGE {
        assert!(keys.iter().any(|k| k == key), "{key}");
    }
}

#[test]
fn held_out_counts() {
    assert_eq!(HeldOut::Fraction(0.05).count(19).unwrap(), 0);
    assert_eq!(HeldOut::Fraction(0.05).count(40).unwrap(), 2);
    assert_eq!(HeldOut::Fraction(0.05).count(100_000).unwrap(), 32);
    assert_eq!(HeldOut::Count(5).count(6).unwrap(), 5);
    assert_eq!(HeldOut::Count(0).count(0).unwrap(), 0);
    assert!(HeldOut::Count(6).count(6).is_err());
}

#[test]
fn the_reference_page_and_its_examples_are_current() {
    let page = std::fs::read_to_string("docs/config.md").unwrap();
    assert_eq!(page, reference::markdown(), "run `qwen-lora config --reference > docs/config.md`");
    for key in reference::keys() {
        assert!(
            page.contains(&format!("| `{}` |", key.rsplit('.').next().unwrap()))
                || page.contains(&format!("## {key}\n"))
        );
    }
    for field in Config::fields().iter().flat_map(|f| f.fields.iter().chain([f])) {
        assert!(!field.docs.is_empty(), "`{}` has no documentation", field.name);
    }
}

#[test]
fn the_schema_knows_types_ranges_and_required_keys() {
    let schema: serde_json::Value = serde_json::from_str(&reference::schema()).unwrap();
    assert_eq!(schema["required"], serde_json::json!(["model", "data"]));
    let training = &schema["properties"]["training"];
    assert_eq!(training["additionalProperties"], false);
    assert_eq!(training["properties"]["batch_size"]["minimum"], 1);
    assert_eq!(training["properties"]["eps"]["exclusiveMinimum"], 0);
    assert_eq!(training["properties"]["mode"]["enum"], serde_json::json!(["lora", "full"]));
    assert_eq!(schema["properties"]["data"]["required"], serde_json::json!(["path"]));
    assert_eq!(schema["properties"]["model"]["anyOf"][0]["type"], "string");
}
