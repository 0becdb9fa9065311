//! Cache entries under faults, stops and several writers; and batches from a folder of images through the caches.

use candle_core::{DType, Device, Tensor};
use image::RgbImage;
use qwen_lora::cache::{CachedSamples, Entry, FillOptions, Filled, Key, LATENTS, PROMPT_EMBEDS, Store, fill};
use qwen_lora::config::NO_PROMPT;
use qwen_lora::data::{Buckets, Dataset, Loader, Plan, PlanSettings, Sample, image as images, place, resample};
use qwen_lora::error::{Error, Result};
use std::collections::HashMap;
use std::path::Path;
use std::sync::Arc;

fn key(i: usize) -> Key {
    Key::prompt_embeds(&format!("caption {i}"), "{}", 512, "encoder", DType::F32)
}

/// An embedding of `i + 1` tokens whose values tell which one it is.
fn entry(i: usize) -> Entry {
    let values: Vec<f32> = (0..(i + 1) * 4).map(|v| (i * 1000 + v) as f32).collect();
    Entry::from([(PROMPT_EMBEDS.to_string(), Tensor::from_vec(values, (i + 1, 4), &Device::Cpu).unwrap())])
}

fn values(entry: &Entry) -> Vec<f32> {
    entry[PROMPT_EMBEDS].flatten_all().unwrap().to_vec1().unwrap()
}

const OPTIONS: FillOptions = FillOptions { label: "prompt embeddings", batch_size: 2, quiet: true };

fn fill_all(store: &Store, keys: &[Key]) -> Result<Filled> {
    fill(store, keys, OPTIONS, |batch| Ok(batch.iter().map(|&i| entry(i)).collect()))
}

fn assert_all_right(store: &Store, n: usize) {
    for i in 0..n {
        assert_eq!(values(&store.get(&key(i)).unwrap().expect("it was filled")), values(&entry(i)), "entry {i}");
    }
    let files = std::fs::read_dir(store.dir()).unwrap().count();
    assert_eq!(files, n, "entries and nothing else");
}

#[test]
fn filling_goes_on_where_it_stopped_and_computes_nothing_twice() {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(dir.path()).unwrap();
    let mut keys: Vec<Key> = (0..7).map(key).collect();
    keys.push(key(0)); // one caption of two images
    let mut calls = 0;
    let stopped = fill(&store, &keys, OPTIONS, |batch| {
        calls += 1;
        match calls {
            3 => Err(Error::interrupted("stopped")),
            _ => Ok(batch.iter().map(|&i| entry(i)).collect()),
        }
    });
    assert_eq!(stopped.unwrap_err().exit_code(), 130);
    let mut computed = Vec::new();
    let filled = fill(&store, &keys, OPTIONS, |batch| {
        computed.extend_from_slice(batch);
        Ok(batch.iter().map(|&i| entry(i)).collect())
    })
    .unwrap();
    assert_eq!(computed, [4, 5, 6]);
    assert_eq!(filled, Filled { computed: 3, reused: 4, notices: vec![] });
    assert_all_right(&store, 7);
    fill(&store, &keys, OPTIONS, |_| panic!("nothing is missing")).unwrap();
}

#[test]
fn a_damaged_entry_is_never_used_and_is_computed_anew_with_a_notice() {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(dir.path()).unwrap();
    let keys: Vec<Key> = (0..6).map(key).collect();
    fill_all(&store, &keys).unwrap();
    let edit = |i: usize, change: &dyn Fn(&mut Vec<u8>)| {
        let path = store.path(&keys[i]);
        let mut bytes = std::fs::read(&path).unwrap();
        change(&mut bytes);
        std::fs::write(path, bytes).unwrap();
    };
    edit(0, &|b| b.truncate(b.len() - 4));
    edit(1, &|b| b.clear());
    edit(2, &|b| *b.last_mut().unwrap() ^= 1); // one bit of one number
    edit(3, &|b| b[..8].fill(0xFF));
    std::fs::copy(store.path(&keys[5]), store.path(&keys[4])).unwrap(); // whole, but another entry
    for damaged in &keys[..5] {
        assert!(store.get(damaged).unwrap().is_none());
        assert!(store.require(damaged).unwrap_err().to_string().contains(&damaged.hex()));
    }
    let filled = fill_all(&store, &keys).unwrap();
    assert_eq!((filled.computed, filled.reused), (5, 1));
    let expected =
        ["cut or corrupt", "cut or corrupt", "wrong checksum", "cut or corrupt", "another entry than its name"];
    for (notice, part) in filled.notices.iter().zip(expected) {
        assert!(notice.contains(part) && notice.ends_with("computed anew"), "{notice}");
    }
    assert_eq!(filled.notices.len(), 5);
    assert_all_right(&store, 6);
}

#[test]
fn a_write_that_fails_is_one_error_and_leaves_the_rest_usable() {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(dir.path()).unwrap();
    let keys: Vec<Key> = (0..6).map(key).collect();
    let obstacle = store.path(&keys[3]);
    std::fs::create_dir(&obstacle).unwrap();
    let error = fill_all(&store, &keys).unwrap_err();
    assert_eq!(error.exit_code(), 1);
    assert!(error.to_string().contains(&keys[3].hex()), "{error}");
    std::fs::remove_dir(obstacle).unwrap();
    assert_eq!(fill_all(&store, &keys).unwrap().reused, 3);
    assert_all_right(&store, 6);
}

#[test]
fn several_writers_of_one_entry_never_show_a_reader_half_of_it() {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(dir.path()).unwrap();
    store.put(&key(200), &entry(200)).unwrap();
    std::thread::scope(|scope| {
        for _ in 0..3 {
            scope.spawn(|| (0..20).for_each(|_| store.put(&key(200), &entry(200)).unwrap()));
        }
        for _ in 0..200 {
            assert_eq!(values(&store.require(&key(200)).unwrap()), values(&entry(200)));
        }
    });
    assert_eq!(std::fs::read_dir(store.dir()).unwrap().count(), 1, "nothing is left over");
}

/// In a process of its own, so that it can be killed: fills the store named in the environment, endlessly.
#[test]
fn child_that_is_killed_while_filling() {
    let Ok(dir) = std::env::var("QWEN_LORA_TEST_STORE") else { return };
    let store = Store::open(Path::new(&dir)).unwrap();
    for i in (0..50).cycle() {
        store.put(&key(i), &entry(i)).unwrap();
    }
}

#[test]
fn a_kill_at_any_moment_leaves_only_whole_entries() {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(dir.path()).unwrap();
    for round in 0..5 {
        // Each round gets further: wait until the child has written this entry (again).
        let awaited = store.path(&key(round * 10));
        let _ = std::fs::remove_file(&awaited);
        let mut child = std::process::Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "child_that_is_killed_while_filling"])
            .env("QWEN_LORA_TEST_STORE", dir.path())
            .stdout(std::process::Stdio::null())
            .spawn()
            .unwrap();
        while !awaited.exists() {
            assert!(child.try_wait().unwrap().is_none(), "the child ended by itself");
            std::thread::sleep(std::time::Duration::from_millis(1));
        }
        child.kill().unwrap();
        child.wait().unwrap();
    }
    let keys: Vec<Key> = (0..50).map(key).collect();
    let filled = fill_all(&store, &keys).unwrap();
    assert!(filled.reused > 40 && filled.notices.is_empty(), "{filled:?}");
    for i in 0..50 {
        assert_eq!(values(&store.require(&key(i)).unwrap()), values(&entry(i)));
    }
    // What the kills left is hidden, and goes once it is old.
    let hour_ago = std::time::SystemTime::now() - std::time::Duration::from_secs(4000);
    for file in std::fs::read_dir(dir.path()).unwrap() {
        std::fs::File::options().write(true).open(file.unwrap().path()).unwrap().set_modified(hour_ago).unwrap();
    }
    Store::open(dir.path()).unwrap();
    assert_all_right(&store, 50);
}

/// From files to batches: latents that are the mean colour, embeddings that are the caption's bytes.
#[test]
fn a_folder_becomes_batches_through_the_caches() {
    let dir = tempfile::tempdir().unwrap();
    for (i, (h, w)) in [(32, 32), (40, 40), (32, 60), (64, 30), (33, 33)].into_iter().enumerate() {
        RgbImage::from_pixel(w, h, image::Rgb([50 * i as u8; 3])).save(dir.path().join(format!("{i}.png"))).unwrap();
        std::fs::write(dir.path().join(format!("{i}.txt")), "c".repeat(i + 1)).unwrap();
    }
    let dataset = Dataset::open(dir.path(), None, true).unwrap();
    let sizes: Vec<_> = dataset.items().iter().map(|i| i.size).collect();
    let samples = place::place(&sizes, &[Buckets::new(32, 16).unwrap(), Buckets::new(64, 16).unwrap()]);

    let cache = tempfile::tempdir().unwrap();
    let store = Store::open(cache.path()).unwrap();
    let caption_key = |caption: &str| Key::prompt_embeds(caption, "<{}>", 512, "bytes", DType::BF16);
    let captions = dataset.captions();
    assert_eq!(captions, [NO_PROMPT, "c", "cc", "ccc", "cccc", "ccccc"]);
    let keys: Vec<Key> = captions.iter().map(|c| caption_key(c)).collect();
    let embed = |&i: &usize| {
        let bytes: Vec<f32> = format!("<{}>", captions[i]).bytes().map(f32::from).collect();
        let embeds = Tensor::from_vec(bytes.clone(), (bytes.len(), 1), &Device::Cpu)?.to_dtype(DType::BF16)?;
        Ok(Entry::from([(PROMPT_EMBEDS.to_string(), embeds)]))
    };
    fill(&store, &keys, OPTIONS, |batch| batch.iter().map(embed).collect()).unwrap();

    let latents_of: HashMap<Sample, Key> =
        samples.iter().map(|s| (*s, Key::latents(&dataset.items()[s.item].image_hash, s.bucket, "mean"))).collect();
    let keys: Vec<Key> = samples.iter().map(|s| latents_of[s]).collect();
    let encode = |&i: &usize| {
        let Sample { bucket, item } = samples[i];
        let image = resample::cover_crop(&dataset.load(item)?, bucket.height(), bucket.width())?;
        let pixels = images::to_pixels(&image);
        let mean = pixels.iter().map(|&p| f64::from(p)).sum::<f64>() / pixels.len() as f64;
        let latents = Tensor::full(mean as f32, (16, bucket.height() / 8, bucket.width() / 8), &Device::Cpu)?;
        Ok(Entry::from([(LATENTS.to_string(), latents)]))
    };
    fill(&store, &keys, OPTIONS, |batch| batch.iter().map(encode).collect()).unwrap();

    let settings = PlanSettings { seed: 3, batch_size: 2, held_out: 0, caption_dropout: 0.3 };
    let plan = Arc::new(Plan::new(&samples, settings).unwrap());
    let cached = CachedSamples {
        mask_of: HashMap::new(),
        latents: store.clone(),
        prompt_embeds: store.clone(),
        latents_of,
        caption_of: dataset.items().iter().map(|i| caption_key(&i.caption)).collect(),
        no_caption: caption_key(NO_PROMPT),
    };
    let (there, plan_there) = (cached.clone(), plan.clone());
    let loader = Loader::new(4..40, 2, move |step| there.step(&plan_there, step)).unwrap();
    let (mut dropped, mut kept) = (0, 0);
    for (step, batch) in (4..40).zip(loader) {
        let batch = batch.unwrap();
        let planned = plan.batch(step);
        assert_eq!(batch.items, planned.items.iter().map(|i| i.item).collect::<Vec<_>>());
        assert_eq!(batch.bucket, planned.bucket);
        let (h, w) = (batch.bucket.height() / 8, batch.bucket.width() / 8);
        assert_eq!(batch.latents.dims(), [batch.len(), 16, h, w]);
        for (row, planned) in planned.items.iter().enumerate() {
            let caption_len = if planned.caption_dropped { NO_PROMPT.len() } else { planned.item + 1 };
            assert_eq!(batch.lengths[row], caption_len + 2);
            assert_eq!(batch.caption_dropped[row], planned.caption_dropped);
            *if planned.caption_dropped { &mut dropped } else { &mut kept } += 1;
            let embeds = batch.prompt_embeds.get(row).unwrap().to_dtype(DType::F32).unwrap();
            let embeds: Vec<f32> = embeds.flatten_all().unwrap().to_vec1().unwrap();
            let caption = if planned.caption_dropped { NO_PROMPT.into() } else { "c".repeat(caption_len) };
            let mut text = format!("<{caption}>").into_bytes();
            text.resize(embeds.len(), 0);
            assert_eq!(embeds, text.into_iter().map(f32::from).collect::<Vec<_>>());
            let latents: Vec<f32> = batch.latents.get(row).unwrap().flatten_all().unwrap().to_vec1().unwrap();
            let expected = 50.0 * planned.item as f32 / 127.5 - 1.0;
            assert!(latents.iter().all(|v| (v - expected).abs() < 1e-5));
        }
    }
    assert!(dropped > 0 && kept > 0);

    std::fs::remove_file(store.path(&cached.caption_of[0])).unwrap();
    std::fs::remove_file(store.path(&cached.no_caption)).unwrap();
    let lost = (0..40).find_map(|step| cached.step(&plan, step).err()).expect("item 0 comes up");
    assert!(lost.to_string().contains("is gone\nhint: run again"), "{lost}");
}
