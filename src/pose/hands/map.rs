//! Where hands are, as a map whose sum is about their number.
//!
//! Around a palm about eight boxes are sure of it, whatever its size; elsewhere thousands are a little unsure of
//! nothing. The squares of the confidences keep the former and lose the latter: an eighth of their sum counts hands.

use crate::error::Result;
use crate::kernels::cpu::{self, view};
use crate::kernels::tape::{Value, record};
use candle_core::DType;

/// Boxes that are sure of one palm.
const BOXES: f32 = 8.0;

/// The cells of a map; cell (i, j) stands for pixel (i, j) times `stride`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HandGrid {
    /// Pixels per cell.
    pub stride: usize,
    /// Rows.
    pub height: usize,
    /// Columns.
    pub width: usize,
}

/// Along one axis, the two cells of a grid between which the centre of each cell of a level lies, with their weights;
/// none for centres outside the image, where the level has only padding.
type Taps = Vec<Option<[(usize, f32); 2]>>;

fn taps(cells: usize, level_stride: usize, pixels: usize, stride: usize, n: usize) -> Taps {
    let tap = |cell: usize| {
        let centre = (cell as f32 + 0.5) * level_stride as f32;
        let at = (centre / stride as f32).min((n - 1) as f32);
        let (low, share) = (at.floor() as usize, at.fract());
        (centre < pixels as f32).then_some([(low, 1.0 - share), ((low + 1).min(n - 1), share)])
    };
    (0..cells).map(tap).collect()
}

/// Confidences of boxes in [0, 1], one level per stride, as one map: each gives an eighth of its square, shared by the
/// cells around it.
///
/// Shapes: each of `scores` (B, h, w, boxes) of images of `image` (H, W) pixels -> (B, `grid.height`, `grid.width`, 1).
pub fn hand_map(scores: &[Value], strides: &[usize], image: [usize; 2], grid: HandGrid) -> Result<Value> {
    let batch = scores[0].tensor().dim(0)?;
    let cells = grid.height * grid.width;
    let mut out = vec![0f32; batch * cells];
    let mut levels = Vec::new();
    for (score, &stride) in scores.iter().zip(strides) {
        let (_, h, w, boxes) = score.tensor().dims4()?;
        let level = Level {
            score: score.tensor().clone(),
            rows: taps(h, stride, image[0], grid.stride, grid.height),
            columns: taps(w, stride, image[1], grid.stride, grid.width),
            boxes,
        };
        let values = view(score.tensor())?;
        level.for_each(cells, grid.width, |first, around| {
            let squares: f32 = values[first..first + boxes].iter().map(|p| p * p).sum();
            around.iter().for_each(|&(cell, weight)| out[cell] += weight * squares / BOXES);
        });
        drop(values);
        levels.push(level);
    }
    let y = cpu::from_f32(out, (batch, grid.height, grid.width, 1), DType::F32)?;
    let inputs: Vec<&Value> = scores.iter().collect();
    let mut outputs = record(&inputs, vec![y], move |grads| {
        let grad = grads.into_iter().next().flatten().expect("backward runs only when the output has a gradient");
        let dy = view(&grad)?;
        let one = |level: &Level| {
            let values = view(&level.score)?;
            let mut dx = vec![0f32; values.len()];
            level.for_each(cells, grid.width, |first, around| {
                let sum: f32 = around.iter().map(|&(cell, weight)| weight * dy[cell]).sum();
                for i in first..first + level.boxes {
                    dx[i] = 2.0 * values[i] * sum / BOXES;
                }
            });
            cpu::from_f32(dx, level.score.shape(), DType::F32).map(Some)
        };
        levels.iter().map(one).collect()
    });
    Ok(outputs.remove(0))
}

struct Level {
    score: candle_core::Tensor,
    rows: Taps,
    columns: Taps,
    boxes: usize,
}

impl Level {
    /// For each cell inside the image the index of its first confidence, and the four cells of the map around it with
    /// their weights.
    fn for_each(&self, cells: usize, width: usize, mut f: impl FnMut(usize, &[(usize, f32); 4])) {
        let per_image = self.rows.len() * self.columns.len();
        let batch = self.score.elem_count() / (per_image * self.boxes).max(1);
        for n in 0..batch {
            for (i, row) in self.rows.iter().enumerate() {
                for (j, column) in self.columns.iter().enumerate() {
                    let (Some(row), Some(column)) = (row, column) else { continue };
                    let around = std::array::from_fn(|k| {
                        let ((y, a), (x, b)) = (row[k / 2], column[k % 2]);
                        (n * cells + y * width + x, a * b)
                    });
                    f((n * per_image + i * self.columns.len() + j) * self.boxes, &around);
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernels::backward;
    use crate::kernels::testing::randn;

    #[test]
    fn squares_are_shared_by_the_cells_around_and_none_is_lost_inside_the_image() {
        // A single sure box at stride 8 in the cell of pixel (12, 20), onto cells of 16 pixels: (0.75, 1.25).
        let mut values = vec![0f32; 4 * 4 * 2];
        values[(4 + 2) * 2 + 1] = 0.5;
        let level = Value::constant(cpu::from_f32(values, (1, 4, 4, 2), DType::F32).unwrap());
        let grid = HandGrid { stride: 16, height: 3, width: 3 };
        let map = hand_map(&[level], &[8], [32, 32], grid).unwrap();
        let map = map.tensor().flatten_all().unwrap().to_vec1::<f32>().unwrap();
        let one = 0.25 / 8.0;
        let expected = [0.0, 0.25 * 0.75 * one, 0.25 * 0.25 * one, 0.0, 0.75 * 0.75 * one, 0.75 * 0.25 * one];
        map.iter().zip(expected).for_each(|(a, b)| assert!((a - b).abs() < 1e-7, "{map:?}"));

        // Padding does not count, and the last cells keep what lies beyond them.
        let level = Value::constant((randn(0, &[2, 4, 4, 3], 0.0) + 1.0).unwrap());
        let map = hand_map(&[level], &[8], [20, 32], HandGrid { stride: 16, height: 1, width: 2 }).unwrap();
        let sum = map.tensor().sum_all().unwrap().to_scalar::<f32>().unwrap();
        // Rows 4, 12 of 4, 12, 20, 28 are inside; two images, four columns, three boxes.
        assert!((sum - (2 * 2 * 4 * 3) as f32 / 8.0).abs() < 1e-5, "{sum}");
    }

    #[test]
    fn gradients_equal_finite_differences() {
        let inputs = [randn(0, &[2, 6, 4, 2], 0.5), randn(1, &[2, 3, 2, 3], 0.5)];
        let grid = HandGrid { stride: 4, height: 11, width: 8 };
        let seed = randn(2, &[2, 11, 8, 1], 1.0);
        let leaves: Vec<Value> = inputs.iter().map(|t| Value::leaf(t.clone())).collect();
        let loss = |levels: &[Value]| -> f64 {
            let map = hand_map(levels, &[8, 16], [43, 30], grid).unwrap();
            (map.tensor() * &seed).unwrap().sum_all().unwrap().to_scalar::<f32>().unwrap().into()
        };
        let map = hand_map(&leaves, &[8, 16], [43, 30], grid).unwrap();
        let mut grads = backward(vec![(map, seed.clone())]).unwrap();
        for (which, leaf) in leaves.iter().enumerate() {
            let grad = grads.take(leaf).unwrap().flatten_all().unwrap().to_vec1::<f32>().unwrap();
            for (i, expected) in grad.iter().enumerate() {
                let moved = |by: f32| {
                    let mut levels = inputs.clone();
                    let mut values = levels[which].flatten_all().unwrap().to_vec1::<f32>().unwrap();
                    values[i] += by;
                    levels[which] = cpu::from_f32(values, levels[which].shape(), DType::F32).unwrap();
                    loss(&levels.map(Value::constant))
                };
                let numeric = (moved(0.05) - moved(-0.05)) / 0.1;
                assert!((numeric - f64::from(*expected)).abs() < 1e-4, "{which} {i}: {numeric} {expected}");
            }
        }
    }
}
