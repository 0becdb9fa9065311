//! Which buckets each image is trained in.

use crate::data::bucket::{Bucket, Buckets};
use crate::data::image::Size;

/// An item in one of its shapes: what is encoded once, cached, and seen once per epoch.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Sample {
    /// The shape that the image is resized and cropped to.
    pub bucket: Bucket,
    /// Index in the dataset.
    pub item: usize,
}

/// Gives each image one bucket per resolution, whatever its own size: with two resolutions every image is seen twice
/// per epoch. Sorted by bucket, then item; resolutions that lead to one bucket count once.
pub fn place(sizes: &[Size], resolutions: &[Buckets]) -> Vec<Sample> {
    let mut samples: Vec<Sample> = resolutions
        .iter()
        .flat_map(|buckets| {
            sizes.iter().enumerate().map(|(item, &size)| Sample { bucket: buckets.nearest(size), item })
        })
        .collect();
    samples.sort_unstable();
    samples.dedup();
    samples
}

/// What the user may want to know of a placement: images that are enlarged by more than a tenth, and images that lose
/// more than a quarter to the crop. The worst of each kind is named; `path` gives an item's name.
pub fn notices<'a>(sizes: &[Size], samples: &[Sample], path: impl Fn(usize) -> &'a str) -> Vec<String> {
    let mut notices = Vec::new();
    let mut report = |what: &str, limit: f64, measure: &dyn Fn(&Sample) -> f64, show: &dyn Fn(f64) -> String| {
        let over: Vec<(&Sample, f64)> =
            samples.iter().map(|s| (s, measure(s))).filter(|(_, value)| *value > limit).collect();
        if let Some((worst, value)) = over.iter().max_by(|a, b| a.1.total_cmp(&b.1).then(b.0.cmp(a.0))) {
            let count = over.len();
            notices.push(format!("{count} of {} {what}; most: {} ({})", samples.len(), path(worst.item), show(*value)));
        }
    };
    report(
        "images are smaller than their bucket and are enlarged",
        1.1,
        &|s| s.bucket.scale(sizes[s.item]),
        &|scale| format!("{scale:.1}x"),
    );
    report("images lose more than a quarter to the crop", 0.25, &|s| 1.0 - s.bucket.kept(sizes[s.item]), &|lost| {
        format!("{:.0} %", 100.0 * lost)
    });
    notices
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_image_gets_one_bucket_per_resolution() {
        let size = |height, width| Size { height, width };
        let sizes = [size(600, 600), size(300, 100), size(2000, 3000)];
        let resolutions = [Buckets::new(256, 16).unwrap(), Buckets::new(512, 16).unwrap()];
        let samples = place(&sizes, &resolutions);
        assert_eq!(samples.len(), 6);
        let square: Vec<String> = samples.iter().filter(|s| s.item == 0).map(|s| s.bucket.to_string()).collect();
        assert_eq!(square, ["256x256", "512x512"]);
        assert_eq!(place(&sizes, &[resolutions[0].clone(), resolutions[0].clone()]).len(), 3);

        let notices = notices(&sizes, &samples, |i| ["a", "b", "c"][i]);
        assert_eq!(notices.len(), 1);
        assert!(notices[0].starts_with("2 of 6 images are smaller") && notices[0].contains("b (3.0x)"), "{notices:?}");
    }
}
