//! The files of an evaluation: `table.csv`, `pictures.csv`, `results.json`.

use crate::error::{Error, Result};
use crate::eval::measure::{Comparison, Evaluation};
use crate::io::write_atomic;
use serde_json::{Value as Json, json};
use std::collections::BTreeSet;
use std::io::Write;
use std::path::{Path, PathBuf};

/// Writes the files into `folder` and gives their paths.
///
/// Errors: the folder or a file cannot be written.
pub fn write(folder: &Path, comparison: &Comparison, evaluation: &Evaluation) -> Result<Vec<PathBuf>> {
    std::fs::create_dir_all(folder).map_err(|e| Error::io("create", folder, e))?;
    let mut json = evaluation.table.to_json();
    json["pictures"] = pictures_json(comparison, evaluation);
    let files = [
        ("table.csv", evaluation.table.to_csv()?),
        ("pictures.csv", pictures_csv(comparison, evaluation)?),
        ("results.json", format!("{json:#}\n").into_bytes()),
    ];
    let mut paths = Vec::new();
    for (name, bytes) in files {
        let path = folder.join(name);
        write_atomic(&path, |file| file.write_all(&bytes))?;
        paths.push(path);
    }
    Ok(paths)
}

/// One line for each picture of each set, one column for each metric that any picture has.
fn pictures_csv(comparison: &Comparison, evaluation: &Evaluation) -> Result<Vec<u8>> {
    let failed = |e: csv::Error| Error::run("cannot write the pictures as CSV").detail(e.to_string());
    let keys: BTreeSet<&str> = evaluation.pictures.iter().flatten().flat_map(|v| v.keys().copied()).collect();
    let mut writer = csv::Writer::from_writer(Vec::new());
    writer.write_record(["set", "picture", "prompt"].iter().chain(&keys)).map_err(failed)?;
    for (set, values) in comparison.sets.iter().zip(&evaluation.pictures) {
        for (picture, values) in set.pictures.iter().zip(values) {
            let head = [set.name.clone(), picture.key.clone(), picture.prompt.clone().unwrap_or_default()];
            let value = |key: &&str| values.get(key).map(f64::to_string).unwrap_or_default();
            writer.write_record(head.into_iter().chain(keys.iter().map(value))).map_err(failed)?;
        }
    }
    writer.into_inner().map_err(|e| Error::run("cannot write the pictures as CSV").detail(e.to_string()))
}

fn pictures_json(comparison: &Comparison, evaluation: &Evaluation) -> Json {
    let sets = comparison.sets.iter().zip(&evaluation.pictures);
    let pictures = sets.flat_map(|(set, values)| {
        set.pictures.iter().zip(values).map(|(picture, values)| {
            // JSON has no infinity: the PSNR of equal pictures is null.
            json!({"set": set.name, "picture": picture.key, "path": picture.path, "prompt": picture.prompt, "values": values})
        })
    });
    pictures.collect()
}
