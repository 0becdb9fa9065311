//! `metrics.jsonl`: one JSON object a line, for every step and every held-out measurement.

use crate::error::{Error, Result};
use crate::io::write_atomic;
use crate::train::batches::TrainBatch;
use crate::train::step::Loss;
use crate::train::structured::StructuredLoss;
use serde::Serialize;
use std::fs::{File, OpenOptions};
use std::io::{Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::time::Duration;

/// What one step did.
#[derive(Clone, Debug, Serialize)]
pub struct StepMetrics {
    /// Steps done, this one included.
    pub step: u64,
    /// The stage that it belongs to, in a staged run.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub stage: Option<String>,
    /// Epoch of the step's first batch, from 0.
    pub epoch: u64,
    /// Weighted mean squared error, averaged over the step's samples.
    pub loss: f64,
    /// Learning rate of the update.
    pub lr: f64,
    /// Norm of all gradients before clipping.
    pub grad_norm: f64,
    /// Mean noise level of the step's samples.
    pub sigma_mean: f64,
    /// Samples in the step.
    pub samples: usize,
    /// How many of them were trained without their caption.
    pub captions_dropped: usize,
    /// What the structured loss did; none in a run without it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub structured: Option<StructuredMetrics>,
    /// Seconds that the step took.
    pub step_s: f64,
}

/// What the structured loss did in one step. Means over the samples on which it acted; left out where it acted on none.
#[derive(Clone, Debug, Serialize)]
pub struct StructuredMetrics {
    /// Samples on which it acted: the step was due, the gate open, someone in the target.
    pub fired: usize,
    /// How far the gate was open.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub gate: Option<f64>,
    /// Squared error of these samples, without weights.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub reconstruction: Option<f64>,
    /// Distance of the pose maps, relative to the target's mass, without weight and scale.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub pose: Option<f64>,
    /// Huber loss of the relative soft counts, without weight and scale.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub count: Option<f64>,
    /// What the count term counts: `hands`, `limb ends` or `keypoints`.
    pub counted: &'static str,
    /// What pose and count added to `loss`, weighted and scaled; a mean over all samples of the step.
    pub added: f64,
    /// Norm of the reconstruction's gradient at the network's prediction, in the batches where the loss acted.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub grad_norm_reconstruction: Option<f64>,
    /// Norm of the gradient of pose and count together at the prediction.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub grad_norm_structured: Option<f64>,
    /// Norm of the pose term's gradient at the pose maps, weighted and scaled.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub map_grad_norm_pose: Option<f64>,
    /// The same of the count term.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub map_grad_norm_count: Option<f64>,
}

impl StructuredMetrics {
    /// Of the sums over one or several batches.
    fn new(sum: &StructuredLoss, counted: &'static str, batches: f64) -> Self {
        let mean = |value: f64| (sum.fired > 0).then(|| value / sum.fired as f64);
        let norm = |squares: f64| (sum.fired > 0).then(|| squares.sqrt());
        Self {
            fired: sum.fired,
            gate: mean(sum.gate),
            reconstruction: mean(sum.reconstruction),
            pose: mean(sum.pose),
            count: mean(sum.count),
            counted,
            added: sum.added / batches,
            grad_norm_reconstruction: norm(sum.reconstruction_gradient),
            grad_norm_structured: norm(sum.structured_gradient),
            map_grad_norm_pose: norm(sum.pose_gradient_at_maps),
            map_grad_norm_count: norm(sum.count_gradient_at_maps),
        }
    }
}

/// Sums over the batches of one step.
#[derive(Default)]
pub struct StepTotals {
    loss: f64,
    /// In units of the first batch, so that batches of one size weigh exactly 1.
    weight: f64,
    sigma: f64,
    items: Vec<usize>,
    first_len: usize,
    captions_dropped: usize,
    epoch: Option<u64>,
    structured: Option<(StructuredLoss, &'static str)>,
}

impl StepTotals {
    /// Adds a batch and its loss.
    pub fn add(&mut self, loss: &Loss, batch: &TrainBatch) {
        if self.items.is_empty() {
            self.first_len = batch.items.len();
        }
        let weight = batch.items.len() as f64 / self.first_len as f64;
        self.loss += weight * loss.mean;
        self.weight += weight;
        self.sigma += batch.noisy.sigmas.iter().map(|&s| f64::from(s)).sum::<f64>();
        self.items.extend(&batch.items);
        self.captions_dropped += batch.captions_dropped;
        self.epoch.get_or_insert(batch.epoch);
        if let Some(terms) = &loss.structured {
            let (sum, _) = self.structured.get_or_insert_with(|| (StructuredLoss::default(), terms.counted));
            sum.accumulate(terms, weight);
        }
    }

    /// Dataset index of each sample so far.
    pub fn items(&self) -> &[usize] {
        &self.items
    }

    /// The line of a step after which `step` steps are done.
    pub fn metrics(&self, stage: Option<&str>, step: u64, lr: f64, grad_norm: f64, took: Duration) -> StepMetrics {
        StepMetrics {
            stage: stage.map(str::to_string),
            step,
            epoch: self.epoch.unwrap_or_default(),
            loss: self.loss / self.weight,
            lr,
            grad_norm,
            sigma_mean: self.sigma / self.items.len() as f64,
            samples: self.items.len(),
            captions_dropped: self.captions_dropped,
            structured: self.structured.as_ref().map(|(s, counted)| StructuredMetrics::new(s, counted, self.weight)),
            step_s: took.as_secs_f64(),
        }
    }
}

/// A measurement of the held-out loss.
#[derive(Clone, Debug, Serialize)]
pub struct HeldOutMetrics {
    /// Steps done before the measurement.
    pub step: u64,
    /// Mean loss over held-out images and noise levels.
    pub held_out_loss: f64,
    /// Mean loss at each of the fixed noise levels, lowest quantile first.
    pub held_out_by_sigma: Vec<f64>,
}

/// Appends lines to the file.
pub struct MetricsFile {
    path: PathBuf,
    file: File,
}

impl MetricsFile {
    /// Opens the file for appending, without the lines of steps after `step` and without a half-written last line. At
    /// step 0 it is emptied: the measurement before the first step is made again.
    pub fn open(path: &Path, step: u64) -> Result<Self> {
        let mut text = String::new();
        match File::open(path) {
            Ok(mut file) => {
                file.read_to_string(&mut text).map_err(|e| Error::io("read", path, e))?;
            }
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => {}
            Err(e) => return Err(Error::io("open", path, e)),
        }
        let keep = |line: &&str| step > 0 && line.ends_with('\n') && step_of(line) <= Some(step);
        let kept: String = text.split_inclusive('\n').filter(keep).collect();
        if kept != text || text.is_empty() {
            write_atomic(path, |file| file.write_all(kept.as_bytes()))?;
        }
        let file = OpenOptions::new().append(true).open(path).map_err(|e| Error::io("open", path, e))?;
        Ok(Self { path: path.into(), file })
    }

    /// Adds one line, whole or not at all.
    pub fn log(&mut self, metrics: &impl Serialize) -> Result<()> {
        let mut line = serde_json::to_string(metrics).expect("metrics are plain numbers");
        line.push('\n');
        let start = self.file.seek(SeekFrom::End(0)).map_err(|e| Error::io("write", &self.path, e))?;
        self.file.write_all(line.as_bytes()).map_err(|e| {
            // The failed write is what the user needs to hear about; half a line would be cut when the run goes on.
            let _ = self.file.set_len(start);
            Error::io("write", &self.path, e)
        })
    }
}

/// The step of a line; none for a line that is not ours, which is kept.
fn step_of(line: &str) -> Option<u64> {
    serde_json::from_str::<serde_json::Value>(line).ok()?.get("step")?.as_u64()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn resuming_cuts_later_and_broken_lines() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("metrics.jsonl");
        std::fs::write(&path, "{\"step\":1}\n{\"step\":2}\n{\"step\":3}\n{\"ste").unwrap();
        let mut metrics = MetricsFile::open(&path, 2).unwrap();
        metrics.log(&HeldOutMetrics { step: 2, held_out_loss: 0.5, held_out_by_sigma: vec![0.5] }).unwrap();
        assert_eq!(
            std::fs::read_to_string(&path).unwrap(),
            "{\"step\":1}\n{\"step\":2}\n{\"step\":2,\"held_out_loss\":0.5,\"held_out_by_sigma\":[0.5]}\n"
        );
    }
}
