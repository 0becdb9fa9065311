//! Downloads from a hub on the loopback interface: progress, cache, and everything that can go wrong.

#[path = "hub/server.rs"]
mod server;

use candle_core::{DType, Device, Tensor};
use qwen_lora::io::hub::{self, HubOptions, Part, RepoId, Transferred, Wanted};
use qwen_lora::io::safetensors::{MappedFile, RawTensor, write};
use qwen_lora::model::source::{ModelSource, ModelSpec};
use qwen_lora::model::synth;
use server::{COMMIT, Fault, REPO, Server};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::Duration;
use tempfile::TempDir;

/// The repository's files: a pipeline in the published layout beside things that nobody needs.
fn repository() -> BTreeMap<String, Vec<u8>> {
    let dir = tempfile::tempdir().unwrap();
    let weights = |name: &str, rows: usize| {
        let path = dir.path().join("w.safetensors");
        let values: Vec<f32> = (0..rows * 64).map(|i| (i as f32).sin()).collect();
        let tensor = Tensor::from_vec(values, (rows, 64), &Device::Cpu).unwrap();
        write(&path, vec![RawTensor::from_tensor(name, &tensor).unwrap()], &BTreeMap::new()).unwrap();
        std::fs::read(&path).unwrap()
    };
    let index = r#"{"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}"#;
    let text = |t: &str| t.as_bytes().to_vec();
    [
        (".gitattributes", text("*.safetensors filter=lfs")),
        ("README.md", text("# a model")),
        ("model_index.json", text(r#"{"_class_name": "QwenImagePipeline"}"#)),
        ("scheduler/scheduler_config.json", text("{}")),
        ("text_encoder/config.json", text(r#"{"hidden_size": 64}"#)),
        ("text_encoder/model.safetensors", weights("c", 100)),
        ("tokenizer/merges.txt", text("#version: 0.2\n")),
        ("tokenizer/vocab.json", text(r#"{"a": 0}"#)),
        ("transformer/config.json", text(r#"{"num_layers": 2}"#)),
        ("transformer/leftover-00001-of-00001.safetensors", weights("z", 10)),
        ("transformer/model-00001-of-00002.safetensors", weights("a", 2000)),
        ("transformer/model-00002-of-00002.safetensors", weights("b", 1500)),
        ("transformer/model.safetensors.index.json", text(index)),
        ("vae/config.json", text(r#"{"z_dim": 16}"#)),
        ("vae/diffusion_pytorch_model.fp16.safetensors", weights("d", 20)),
        ("vae/diffusion_pytorch_model.safetensors", weights("d", 40)),
    ]
    .map(|(path, bytes)| (path.to_string(), bytes))
    .into()
}

const NEEDED: [&str; 12] = [
    "model_index.json",
    "scheduler/scheduler_config.json",
    "text_encoder/config.json",
    "text_encoder/model.safetensors",
    "tokenizer/merges.txt",
    "tokenizer/vocab.json",
    "transformer/config.json",
    "transformer/model-00001-of-00002.safetensors",
    "transformer/model-00002-of-00002.safetensors",
    "transformer/model.safetensors.index.json",
    "vae/config.json",
    "vae/diffusion_pytorch_model.safetensors",
];
const SHARD: &str = "transformer/model-00001-of-00002.safetensors";

fn wanted() -> Wanted {
    let part = |(folder, weights): (&str, bool)| Part { folder: folder.into(), weights };
    let parts =
        [("transformer", true), ("vae", true), ("text_encoder", true), ("tokenizer", false), ("scheduler", false)];
    Wanted { files: vec!["model_index.json".into()], parts: parts.map(part).into() }
}

struct Setup {
    server: Server,
    cache: TempDir,
    options: HubOptions,
}

fn setup() -> Setup {
    let server = Server::start(repository());
    let cache = tempfile::tempdir().unwrap();
    let options = HubOptions {
        endpoint: Some(server.url()),
        cache_dir: Some(cache.path().into()),
        token: Some("hf_good".into()),
        attempts: 3,
        retry_delay: Duration::from_millis(1),
        ..HubOptions::default()
    };
    Setup { server, cache, options }
}

impl Setup {
    fn fetch(&self) -> Result<PathBuf, String> {
        self.fetch_with(|_| ())
    }

    fn fetch_with(&self, change: impl FnOnce(&mut HubOptions)) -> Result<PathBuf, String> {
        let mut options = self.options.clone();
        change(&mut options);
        let repo = RepoId::parse(REPO).unwrap();
        hub::fetch(&repo, &wanted(), &|_| Ok(()), &options).map_err(|e| e.to_string())
    }

    /// What a fetch with changed options says that fails.
    fn refused(&self, change: impl FnOnce(&mut HubOptions)) -> String {
        self.fetch_with(change).expect_err("this must fail")
    }

    fn path(&self, file: &str) -> PathBuf {
        self.cache.path().join("models--Owner--Tiny-Image/snapshots").join(COMMIT).join(file)
    }

    fn recorded(&self, revision: &str) -> bool {
        self.cache.path().join("models--Owner--Tiny-Image/refs").join(revision).exists()
    }
}

fn assert_whole(folder: &Path) {
    let repository = repository();
    for file in NEEDED {
        assert_eq!(std::fs::read(folder.join(file)).unwrap(), repository[file], "{file}");
    }
}

fn assert_says(text: &str, parts: &[&str]) {
    for part in parts {
        assert!(text.contains(part), "`{part}` is not in: {text}");
    }
    assert!(text.contains("\nhint: "), "no hint in: {text}");
}

#[test]
fn a_download_brings_exactly_what_is_needed_and_reports_each_byte() {
    let setup = setup();
    let states = Arc::new(Mutex::new(Vec::<Transferred>::new()));
    let seen = states.clone();
    let folder = setup.fetch_with(|o| o.observer = Some(Arc::new(move |s| seen.lock().unwrap().push(s.clone()))));
    assert_whole(&folder.unwrap());
    assert_eq!(setup.server.bodies_sent(), NEEDED);

    // Two phases, small files and weights; each counts from nothing to all.
    let states = states.lock().unwrap();
    let phases: Vec<&[Transferred]> = states.chunk_by(|a, b| a.total_bytes == b.total_bytes).collect();
    assert_eq!(phases.len(), 2);
    let (small, weights): (Vec<&str>, Vec<&str>) = NEEDED.iter().partition(|f| !f.ends_with(".safetensors"));
    for (phase, files) in phases.into_iter().zip([small, weights]) {
        let total: u64 = files.iter().map(|f| repository()[*f].len() as u64).sum();
        let (first, last) = (phase.first().unwrap(), phase.last().unwrap());
        assert_eq!((first.done_bytes, first.num_files_done), (0, 0));
        assert_eq!((last.done_bytes, last.num_files_done), (total, files.len()));
        assert!(last.is_done() && (last.total_bytes, last.num_files) == (total, files.len()));
        assert!(phase.is_sorted_by_key(|s| s.done_bytes));
    }
    assert!(states.iter().filter(|s| s.done_bytes > 0 && s.done_bytes < s.total_bytes).count() > 3);
}

#[test]
fn a_second_call_downloads_nothing_and_a_commit_hash_asks_nothing() {
    let setup = setup();
    let first = setup.fetch().unwrap();
    let sent = setup.server.bodies_sent();
    let observer = |o: &mut HubOptions| o.observer = Some(Arc::new(|_| panic!("nothing is to be reported")));
    assert_eq!(setup.fetch_with(observer).unwrap(), first);
    assert_eq!(setup.server.bodies_sent(), sent);

    let num_requests = setup.server.num_requests();
    assert_eq!(setup.fetch_with(|o| o.revision = Some(COMMIT.into())).unwrap(), first);
    assert_eq!(setup.server.num_requests(), num_requests);
}

#[test]
fn offline_works_from_the_cache_alone() {
    let mut setup = setup();
    let folder = setup.fetch_with(|o| o.revision = Some("refs/pr/1".into())).unwrap();
    setup.fetch().unwrap();
    let num_requests = setup.server.num_requests();
    assert_eq!(setup.fetch_with(|o| o.offline = true).unwrap(), folder);
    let pull = setup.fetch_with(|o| (o.offline, o.revision) = (true, Some("refs/pr/1".into())));
    assert_eq!(pull.unwrap(), folder);
    assert_eq!(setup.server.num_requests(), num_requests);

    let other = setup.refused(|o| (o.offline, o.revision) = (true, Some("v1.0".into())));
    assert_says(&other, &["offline", REPO, "nothing of revision `v1.0`"]);
    setup.cache = tempfile::tempdir().unwrap();
    setup.options.cache_dir = Some(setup.cache.path().into());
    assert_says(&setup.refused(|o| o.offline = true), &["offline", REPO, "nothing of revision `main`"]);
    assert_eq!(setup.server.num_requests(), num_requests);
}

#[test]
fn offline_refuses_a_snapshot_with_a_hole() {
    let setup = setup();
    setup.fetch().unwrap();
    let offline = || setup.refused(|o| o.offline = true);

    let blob = std::fs::canonicalize(setup.path(SHARD)).unwrap();
    let bytes = std::fs::read(&blob).unwrap();
    std::fs::write(&blob, &bytes[..bytes.len() / 2]).unwrap();
    assert_says(&offline(), &["offline", "model-00001-of-00002.safetensors` is not a whole", "found 256040 bytes"]);
    // The link stays and leads nowhere.
    std::fs::remove_file(&blob).unwrap();
    assert_says(&offline(), &["offline", &format!("no `{SHARD}`")]);
    std::fs::write(&blob, &bytes).unwrap();
    std::fs::write(setup.path("vae/config.json"), "").unwrap();
    assert_says(&offline(), &["offline", "`vae/config.json` is empty"]);
    std::fs::remove_dir_all(setup.path("scheduler")).unwrap();
    assert_says(&offline(), &["offline", "no `scheduler/*.json`"]);
}

#[test]
fn a_file_of_the_wrong_size_in_the_cache_is_fetched_again() {
    let setup = setup();
    setup.fetch().unwrap();
    let blob = std::fs::canonicalize(setup.path(SHARD)).unwrap();
    std::fs::write(&blob, "<html>Service Unavailable</html>").unwrap();
    assert_whole(&setup.fetch().unwrap());
    assert_eq!(setup.server.bodies_sent().len(), NEEDED.len() + 1);
}

#[test]
fn a_cut_connection_is_tried_again() {
    let setup = setup();
    setup.server.fault(SHARD, &[Fault::Cut, Fault::Cut]);
    assert_whole(&setup.fetch().unwrap());
    assert_eq!(setup.server.bodies_sent().iter().filter(|f| *f == SHARD).count(), 3);
}

#[test]
fn a_download_cut_for_good_is_never_taken_for_whole_and_a_later_one_completes_it() {
    let setup = setup();
    setup.server.fault(SHARD, &[Fault::Cut, Fault::Cut, Fault::Cut]);
    let error = setup.refused(|_| ());
    assert_says(&error, &["cannot download", SHARD, REPO, "connection was cut", "run again"]);
    assert!(!setup.path(SHARD).exists());
    assert!(!setup.recorded("main"), "the branch must not point at half a snapshot");
    assert_says(&setup.refused(|o| o.offline = true), &["offline"]);

    let before = setup.server.bodies_sent().len();
    assert_whole(&setup.fetch().unwrap());
    assert!(setup.recorded("main"));
    let again = setup.server.bodies_sent().len() - before;
    assert!(again <= 4, "only what was missing is fetched, not {again} files");
    assert_whole(&setup.fetch_with(|o| o.offline = true).unwrap());
}

#[test]
fn a_connection_that_stalls_ends_in_an_error() {
    let setup = setup();
    setup.server.fault(SHARD, &[Fault::Stall]);
    let error = setup.refused(|o| (o.stall_timeout, o.attempts) = (Duration::from_millis(300), 1));
    assert_says(&error, &["cannot download", SHARD, "stalled"]);
    setup.server.fault(SHARD, &[Fault::Stall]);
    assert_whole(&setup.fetch_with(|o| o.stall_timeout = Duration::from_millis(300)).unwrap());
}

#[test]
fn an_error_page_and_wrong_bytes_are_not_taken_for_the_file() {
    let setup = setup();
    let page = Fault::Answer(403, "", "Access denied by the content network");
    setup.server.fault(SHARD, &[page.clone(), page.clone(), page]);
    let error = setup.refused(|_| ());
    assert_says(&error, &["cannot download", SHARD, "512080 bytes", "Access denied by the content network"]);
    assert!(!setup.path(SHARD).exists());

    setup.server.fault(SHARD, &[Fault::Corrupt, Fault::Corrupt, Fault::Corrupt]);
    let error = setup.refused(|_| ());
    assert_says(&error, &["cannot download", SHARD, "expected SHA-256", "thrown away"]);
    assert!(!setup.path(SHARD).exists() && !setup.recorded("main"));

    setup.server.fault(SHARD, &[Fault::Corrupt]);
    let folder = setup.fetch().unwrap();
    assert_whole(&folder);
    assert!(MappedFile::open(&folder.join(SHARD)).unwrap().tensor("a", DType::F32, &Device::Cpu).is_ok());
}

#[test]
fn a_wrong_token_a_closed_gate_and_unknown_names_are_told_apart() {
    let setup = setup();
    setup.server.hub.lock().unwrap().token = Some("hf_good");
    let wrong = setup.refused(|o| o.token = Some("hf_wrong".into()));
    assert_says(&wrong, &["refuses access", REPO, "401", "Invalid username or password", "HF_TOKEN"]);
    // A token from a file ends in a line end.
    assert_whole(&setup.fetch_with(|o| o.token = Some("hf_good\n".into())).unwrap());

    let refuse = |status, code, message| {
        setup.server.hub.lock().unwrap().refuse = Some((status, code, message));
        setup.refused(|o| o.attempts = 1)
    };
    let gated = refuse(403, "GatedRepo", "Access to this model is restricted");
    assert_says(&gated, &["refuses access", "403", "Access to this model is restricted", "accept the model's terms"]);
    let hidden = refuse(401, "RepoNotFound", "Repository not found");
    assert_says(&hidden, &["knows no model", REPO, "or it is private", "HF_TOKEN"]);
    assert_says(&refuse(404, "RepoNotFound", "Repository not found"), &["knows no model", REPO, "spelling"]);
    assert_says(&refuse(404, "", ""), &["knows no model", REPO]);
    assert_says(&refuse(429, "", "slow down"), &["limits the rate", "slow down", "HF_TOKEN"]);
    // The whole model lies in the cache by now, and the error says so.
    assert_says(&refuse(503, "", "maintenance"), &["503", "maintenance", "`offline: true`"]);
    setup.server.hub.lock().unwrap().refuse = None;
    let revision = setup.refused(|o| o.revision = Some("v9".into()));
    assert_says(&revision, &[REPO, "no revision `v9`", "branch"]);
}

#[test]
fn missing_files_are_named() {
    let setup = setup();
    let without = |gone: &str| {
        let mut files = repository();
        files.retain(|path, _| !path.starts_with(gone));
        setup.server.hub.lock().unwrap().files = files;
        setup.refused(|_| ())
    };
    assert_says(&without("vae/"), &[REPO, "no `vae/*.json`", "diffusers layout"]);
    assert_says(&without("model_index.json"), &[REPO, "no `model_index.json`", "found .gitattributes, README.md"]);
    assert_says(&without("vae/diffusion"), &[REPO, "no `vae/*.safetensors`"]);
    assert_says(&without(SHARD), &[REPO, &format!("no `{SHARD}`"), "its own index names that file"]);
    assert!(setup.server.bodies_sent().iter().all(|f| !f.ends_with(".safetensors")), "no weights before the check");

    setup.server.hub.lock().unwrap().files = repository();
    setup.server.hub.lock().unwrap().vanished = Some("vae/diffusion_pytorch_model.safetensors");
    assert_says(&setup.refused(|_| ()), &[REPO, "no `vae/diffusion_pytorch_model.safetensors`", "main"]);
}

#[test]
fn a_refused_config_ends_the_download_before_the_weights() {
    let setup = setup();
    let repo = RepoId::parse(REPO).unwrap();
    let check = |folder: &Path| {
        assert!(folder.join("transformer/config.json").is_file());
        Err(qwen_lora::error::Error::usage("another architecture"))
    };
    let error = hub::fetch(&repo, &wanted(), &check, &setup.options).unwrap_err().to_string();
    assert_eq!(error, "another architecture");
    assert!(setup.server.bodies_sent().iter().all(|f| !f.ends_with(".safetensors")));
}

/// The files of a folder, by their paths in it.
fn files_under(folder: &Path, prefix: &str, into: &mut BTreeMap<String, Vec<u8>>) {
    for entry in std::fs::read_dir(folder).unwrap().map(Result::unwrap) {
        let name = format!("{prefix}{}", entry.file_name().to_str().unwrap());
        if entry.path().is_dir() {
            files_under(&entry.path(), &format!("{name}/"), into);
        } else {
            into.insert(name, std::fs::read(entry.path()).unwrap());
        }
    }
}

#[test]
fn a_hub_id_becomes_a_pipeline_and_another_family_is_refused_before_its_weights() {
    let setup = setup();
    let mut files = BTreeMap::new();
    files_under(&synth::tiny_in(setup.cache.path()).unwrap(), "", &mut files);
    setup.server.hub.lock().unwrap().files = files.clone();
    let resolve = |spec: &ModelSpec| ModelSource::resolve_with(spec, setup.options.clone());

    // Weights that a file replaces are not fetched.
    let file = setup.cache.path().join("own.safetensors");
    std::fs::write(&file, &files["transformer/diffusion_pytorch_model.safetensors"]).unwrap();
    let replaced = ModelSpec { transformer: Some(file.clone()), ..ModelSpec::new(REPO) };
    let pipeline = resolve(&replaced).unwrap();
    assert_eq!(
        (pipeline.transformer.weights, pipeline.transformer.config),
        (file, setup.path("transformer/config.json"))
    );
    let sent = setup.server.bodies_sent();
    assert!(!sent.contains(&"transformer/diffusion_pytorch_model.safetensors".to_string()), "{sent:?}");

    let pipeline = resolve(&ModelSpec::new(REPO)).unwrap();
    assert_eq!(setup.server.bodies_sent().len(), files.len());
    assert_eq!(pipeline.transformer.open().unwrap().names().count(), 77);
    let offline = ModelSpec { offline: true, ..ModelSpec::new(REPO) };
    assert_eq!(resolve(&offline).unwrap(), pipeline);

    let other = Server::start(files);
    let index = br#"{"_class_name": "FluxPipeline"}"#.to_vec();
    other.hub.lock().unwrap().files.insert("model_index.json".into(), index);
    let cache = tempfile::tempdir().unwrap();
    let options =
        HubOptions { endpoint: Some(other.url()), cache_dir: Some(cache.path().into()), ..setup.options.clone() };
    let error = ModelSource::resolve_with(&ModelSpec::new(REPO), options).unwrap_err();
    assert_says(&error.to_string(), &["FluxPipeline (FLUX.1)", "Qwen/Qwen-Image"]);
    assert!(other.bodies_sent().iter().all(|f| !f.ends_with(".safetensors")));
}

#[test]
fn what_cannot_fit_on_the_disk_is_refused_before_the_first_byte() {
    let setup = setup();
    setup.server.hub.lock().unwrap().claimed_sizes.insert(SHARD.into(), 1 << 62);
    let error = setup.refused(|_| ());
    assert_says(&error, &["not enough disk space", REPO, "4.6 EB free in", "HF_HOME"]);
    assert!(setup.server.bodies_sent().iter().all(|f| !f.ends_with(".safetensors")));
}

#[test]
fn no_network_is_told_apart_from_a_server_that_is_no_hub() {
    let setup = setup();
    // A port that was free a moment ago.
    let closed = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let unreachable = |o: &mut HubOptions| (o.endpoint, o.attempts) = (Some(format!("http://{closed}")), 1);
    assert_says(&setup.refused(unreachable), &["no connection to http://127.0.0.1", "HF_ENDPOINT=https://hf-mirror"]);
    // An encrypted connection begins, and fails for the server's fault: the client is able to speak TLS.
    let encrypted = |o: &mut HubOptions| {
        (o.endpoint, o.attempts) = (Some(setup.server.url().replace("http:", "https:")), 1);
    };
    assert_says(&setup.refused(encrypted), &["no connection to https://127.0.0.1"]);
    setup.fetch().unwrap();
    assert_says(&setup.refused(unreachable), &["no connection", "in the cache: `offline: true`"]);

    setup.server.hub.lock().unwrap().refuse = Some((200, "", "<html>please log in</html>"));
    assert_says(&setup.refused(|_| ()), &["does not answer as a model hub", "HF_ENDPOINT"]);
    let error = setup.refused(|o| o.endpoint = Some("hf-mirror.com".into()));
    assert_says(&error, &["not a URL", "found `hf-mirror.com`", "HF_ENDPOINT"]);
}

#[test]
fn a_hub_id_is_a_base_to_merge_into() {
    let reference = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/reference/case_a");
    let read = |root: &Path| {
        let (mut files, mut todo) = (BTreeMap::new(), vec![root.to_path_buf()]);
        while let Some(path) = todo.pop() {
            if path.is_dir() {
                todo.extend(std::fs::read_dir(&path).unwrap().map(|e| e.unwrap().path()));
            } else {
                let name = path.strip_prefix(root).unwrap().to_str().unwrap().to_string();
                files.insert(name, std::fs::read(&path).unwrap());
            }
        }
        files
    };
    let server = Server::start(read(&reference.join("pipe")));
    let home = tempfile::tempdir().unwrap();
    let merge = |base: &str, out: &str| {
        let lora = reference.join("lora/kohya_lora_unet.safetensors");
        let output = std::process::Command::new(env!("CARGO_BIN_EXE_qwen-lora"))
            .args(["merge", base, lora.to_str().unwrap(), "--weights", "-0.5", "--out", out, "--quiet"])
            .current_dir(home.path())
            .env_remove("HF_TOKEN")
            .env_remove("HF_HUB_CACHE")
            .env("HF_ENDPOINT", server.url())
            .env("HF_HOME", home.path())
            .output()
            .unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        read(&home.path().join(out))
    };
    let from_folder = merge(reference.join("pipe").to_str().unwrap(), "from_folder");
    assert_eq!(server.num_requests(), 0);
    let from_hub = merge(REPO, "from_hub");
    assert_eq!(from_hub.keys().collect::<Vec<_>>(), from_folder.keys().collect::<Vec<_>>());
    assert!(from_hub == from_folder, "the same bytes");
}

#[test]
fn the_environment_names_endpoint_cache_and_token() {
    let setup = setup();
    setup.server.hub.lock().unwrap().token = Some("hf_env");
    let home = tempfile::tempdir().unwrap();
    let child = |extra: &[(&str, &str)]| {
        let output = std::process::Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "child_that_fetches_as_its_environment_says", "--ignored", "--nocapture"])
            .env_remove("HF_HUB_CACHE")
            .env_remove("HF_HUB_DISABLE_IMPLICIT_TOKEN")
            .env("HF_ENDPOINT", setup.server.url())
            .env("HF_HOME", home.path())
            .envs(extra.iter().copied())
            .output()
            .unwrap();
        (output.status.success(), String::from_utf8_lossy(&output.stdout).into_owned())
    };
    let snapshot = format!("models--Owner--Tiny-Image/snapshots/{COMMIT}");
    let (good, printed) = child(&[("HF_TOKEN", "hf_env")]);
    assert!(good && printed.contains(&*home.path().join("hub").join(&snapshot).to_string_lossy()), "{printed}");
    let num_requests = setup.server.num_requests();
    assert!(child(&[("HF_HUB_OFFLINE", "1")]).0);
    assert_eq!(setup.server.num_requests(), num_requests);
    let cache = tempfile::tempdir().unwrap();
    let (good, printed) = child(&[("HF_TOKEN", "hf_env"), ("HF_HUB_CACHE", cache.path().to_str().unwrap())]);
    assert!(good && printed.contains(&*cache.path().join(&snapshot).to_string_lossy()), "{printed}");
    let (good, printed) = child(&[("HF_TOKEN", "hf_wrong")]);
    assert!(!good && printed.contains("refuses access"), "{printed}");
    if cfg!(target_os = "linux") {
        let (good, printed) = child(&[("SSL_CERT_FILE", "/nowhere"), ("SSL_CERT_DIR", "/nowhere")]);
        assert!(!good && printed.contains("CA certificates"), "{printed}");
    }
}

#[test]
#[ignore = "run by the_environment_names_endpoint_cache_and_token in a process of its own"]
fn child_that_fetches_as_its_environment_says() {
    let options = HubOptions { retry_delay: Duration::from_millis(1), ..HubOptions::from_env() };
    match hub::fetch(&RepoId::parse(REPO).unwrap(), &wanted(), &|_| Ok(()), &options) {
        Ok(folder) => println!("fetched into {}", folder.display()),
        Err(e) => {
            println!("{e}");
            std::process::exit(1);
        }
    }
}
