//! Peaks of a map: cells that are larger than all around them.

/// A peak. Coordinates in cells, between cells where the neighbours say so.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Peak {
    /// Row.
    pub y: f32,
    /// Column.
    pub x: f32,
    /// The cell's value.
    pub score: f32,
}

/// One channel of maps (h, w, K) with channels last.
#[derive(Clone, Copy)]
pub struct Map<'a> {
    /// All channels.
    pub values: &'a [f32],
    /// Rows.
    pub height: usize,
    /// Columns.
    pub width: usize,
    /// Number of channels.
    pub channels: usize,
    /// Which one.
    pub channel: usize,
}

impl Map<'_> {
    /// The value of a cell.
    pub fn at(&self, y: usize, x: usize) -> f32 {
        self.values[(y * self.width + x) * self.channels + self.channel]
    }

    /// The value between cells, bilinear; the border is repeated outside.
    pub fn between(&self, y: f32, x: f32) -> f32 {
        let y = y.clamp(0.0, (self.height - 1) as f32);
        let x = x.clamp(0.0, (self.width - 1) as f32);
        let (y0, x0) = (y as usize, x as usize);
        let (y1, x1) = ((y0 + 1).min(self.height - 1), (x0 + 1).min(self.width - 1));
        let (fy, fx) = (y - y0 as f32, x - x0 as f32);
        let row = |y| self.at(y, x0) * (1.0 - fx) + self.at(y, x1) * fx;
        row(y0) * (1.0 - fy) + row(y1) * fy
    }

    /// The sum over all cells.
    pub fn mass(&self) -> f64 {
        let cell = |i: usize| f64::from(self.values[i * self.channels + self.channel]);
        (0..self.height * self.width).map(cell).sum()
    }

    /// Cells of `threshold` or more that no cell within `radius` exceeds, largest first. Of equal cells the first in
    /// reading order is the peak.
    pub fn peaks(&self, threshold: f32, radius: usize) -> Vec<Peak> {
        let mut peaks = Vec::new();
        for y in 0..self.height {
            for x in 0..self.width {
                let score = self.at(y, x);
                if score >= threshold && self.is_largest(y, x, radius) {
                    let (dy, dx) = (self.nudge(y, x, true), self.nudge(y, x, false));
                    peaks.push(Peak { y: y as f32 + dy, x: x as f32 + dx, score });
                }
            }
        }
        peaks.sort_by(|a, b| b.score.total_cmp(&a.score));
        peaks
    }

    fn is_largest(&self, y: usize, x: usize, radius: usize) -> bool {
        let score = self.at(y, x);
        for v in y.saturating_sub(radius)..(y + radius + 1).min(self.height) {
            for u in x.saturating_sub(radius)..(x + radius + 1).min(self.width) {
                let other = self.at(v, u);
                if other > score || (other == score && (v, u) < (y, x)) {
                    return false;
                }
            }
        }
        true
    }

    /// Where the top of the parabola through a peak and its two neighbours lies, within half a cell.
    fn nudge(&self, y: usize, x: usize, vertical: bool) -> f32 {
        let (i, n) = if vertical { (y, self.height) } else { (x, self.width) };
        if i == 0 || i + 1 == n {
            return 0.0;
        }
        let at = |i: usize| if vertical { self.at(i, x) } else { self.at(y, i) };
        let (before, here, after) = (at(i - 1), at(i), at(i + 1));
        let bend = before - 2.0 * here + after;
        if bend < 0.0 { (0.5 * (before - after) / bend).clamp(-0.5, 0.5) } else { 0.0 }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn peaks_are_found_between_cells_and_plateaus_count_once() {
        // Two bumps at (3.25, 2) and (3.25, 9), in channel 1 of 2.
        let (h, w) = (8, 12);
        let bump = |y: f32, x: f32, cy: f32, cx: f32| (-((y - cy).powi(2) + (x - cx).powi(2)) / 2.0).exp();
        let value = |i: usize| {
            let (y, x) = ((i / 2 / w) as f32, (i / 2 % w) as f32);
            if i.is_multiple_of(2) { 9.0 } else { bump(y, x, 3.25, 2.0) + 0.8 * bump(y, x, 3.25, 9.0) }
        };
        let values: Vec<f32> = (0..h * w * 2).map(value).collect();
        let map = Map { values: &values, height: h, width: w, channels: 2, channel: 1 };
        let peaks = map.peaks(0.3, 1);
        assert_eq!(peaks.len(), 2);
        assert!(peaks[0].score > peaks[1].score);
        for (peak, x) in peaks.iter().zip([2.0, 9.0]) {
            assert!((peak.y - 3.25).abs() < 0.06 && (peak.x - x).abs() < 0.02, "{peak:?}");
        }
        assert!((map.between(3.0, 2.5) - (map.at(3, 2) + map.at(3, 3)) / 2.0).abs() < 1e-6);
        assert_eq!(map.between(-5.0, -5.0), map.at(0, 0));
        let flat = vec![1.0; 12];
        assert_eq!(Map { values: &flat, height: 3, width: 4, channels: 1, channel: 0 }.peaks(0.5, 1).len(), 1);
    }
}
