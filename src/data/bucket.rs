//! Aspect-ratio buckets: the few image shapes that batches are made of.

use crate::data::image::Size;
use crate::error::{Error, Result};

/// Sides of a bucket are multiples of this: eight pixels a latent, two latents a token.
pub const SIDE_STEP: usize = 16;

/// The longest side of a bucket over the shortest. Longer images lose their ends to the crop.
pub const MAX_ASPECT: f64 = 4.0;

/// An image shape that the model can train on: both sides positive multiples of [`SIDE_STEP`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Bucket {
    height: usize,
    width: usize,
}

impl Bucket {
    /// A bucket of `height` x `width` pixels. Errors: a side that is zero or no multiple of 16.
    pub fn new(height: usize, width: usize) -> Result<Self> {
        if height == 0 || width == 0 || !height.is_multiple_of(SIDE_STEP) || !width.is_multiple_of(SIDE_STEP) {
            return Err(Error::usage("impossible image size")
                .expected(format!("multiples of {SIDE_STEP}"), format!("height {height}, width {width}")));
        }
        Ok(Self { height, width })
    }

    /// Height in pixels.
    pub fn height(self) -> usize {
        self.height
    }

    /// Width in pixels.
    pub fn width(self) -> usize {
        self.width
    }

    /// Tokens of the image in the transformer: eight pixels a latent, two by two latents a token.
    pub fn image_tokens(self) -> usize {
        (self.height / SIDE_STEP) * (self.width / SIDE_STEP)
    }

    /// Width over height.
    pub fn aspect(self) -> f64 {
        self.width as f64 / self.height as f64
    }

    /// By how much an image of `size` is scaled to cover this bucket; above 1 it is enlarged.
    pub fn scale(self, size: Size) -> f64 {
        (self.height as f64 / size.height as f64).max(self.width as f64 / size.width as f64)
    }

    /// The share of an image of `size` that the centre crop keeps.
    pub fn kept(self, size: Size) -> f64 {
        let ratio = self.aspect() / size.aspect();
        ratio.min(1.0 / ratio)
    }
}

impl std::fmt::Display for Bucket {
    /// Width first, as people write image sizes: `1024x768`.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}x{}", self.width, self.height)
    }
}

/// The buckets of one resolution: shapes of about `resolution`^2 pixels from 1:4 to 4:1.
///
/// The shorter side runs over the multiples of `step`; the longer one is the multiple nearest to
/// `resolution^2 / shorter`; both orientations. With one resolution all buckets cost about the same, and a small image
/// is enlarged to cover its bucket: it is scaled by [`Bucket::scale`] and never by more.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Buckets(Vec<Bucket>);

impl Buckets {
    /// The buckets for `resolution` (the side of the square one) in steps of `step` pixels.
    ///
    /// A `step` above 16 gives fewer shapes and so fuller batches, and crops more.
    /// Errors: a step that is no multiple of 16, a resolution below the step.
    pub fn new(resolution: usize, step: usize) -> Result<Self> {
        if step == 0 || !step.is_multiple_of(SIDE_STEP) {
            return Err(Error::usage("impossible step between image sizes")
                .expected(format!("a multiple of {SIDE_STEP}"), step));
        }
        if resolution < step {
            return Err(Error::usage("the resolution is too small")
                .expected(format!("at least {step}, the step between image sizes"), resolution));
        }
        let area = (resolution * resolution) as f64;
        let mut buckets = Vec::new();
        for shorter in (step..=resolution).step_by(step) {
            let longer = (area / shorter as f64 / step as f64).round() as usize * step;
            if longer >= shorter && longer as f64 <= MAX_ASPECT * shorter as f64 {
                buckets.push(Bucket::new(shorter, longer)?);
                buckets.push(Bucket::new(longer, shorter)?);
            }
        }
        buckets.sort_unstable();
        buckets.dedup();
        Ok(Self(buckets))
    }

    /// All buckets, sorted by height, then width.
    pub fn all(&self) -> &[Bucket] {
        &self.0
    }

    /// The bucket whose aspect ratio is nearest to that of `size` in log scale, which is the one whose crop keeps the
    /// most; of two equal ones the larger, then the taller.
    pub fn nearest(&self, size: Size) -> Bucket {
        // `kept` is exp(-|log-aspect error|) by one division, so that machines with another `ln` agree.
        let better = |a: &&Bucket, b: &&Bucket| {
            let area = |b: &Bucket| b.height * b.width;
            a.kept(size).total_cmp(&b.kept(size)).then(area(a).cmp(&area(b))).then(a.cmp(b))
        };
        *self.0.iter().max_by(better).expect("the square bucket is always there")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn size(height: usize, width: usize) -> Size {
        Size { height, width }
    }

    #[test]
    fn all_buckets_have_about_the_area_and_both_orientations() {
        for (resolution, step) in [(768, 16), (1024, 64), (1328, 16), (500, 16), (64, 16), (16, 16)] {
            let buckets = Buckets::new(resolution, step).unwrap();
            for b in buckets.all() {
                assert_eq!((b.height % step, b.width % step), (0, 0));
                assert!(buckets.all().contains(&Bucket::new(b.width, b.height).unwrap()));
                assert!(b.aspect() <= 4.0 && b.aspect() >= 0.25);
                // The longer side is off by half a step at most, the square by one step on the shorter one.
                let area = (b.height * b.width) as f64 / (resolution * resolution) as f64;
                let tolerance = 1.5 * step as f64 / resolution as f64;
                assert!((area - 1.0).abs() <= tolerance.max(1e-9), "{b} at {resolution}: {area}");
            }
            let side = resolution / step * step;
            assert!(buckets.all().iter().any(|b| b.height == side), "{resolution}");
        }
    }

    #[test]
    fn an_image_gets_the_nearest_aspect_and_extremes_are_clamped() {
        let buckets = Buckets::new(1024, 16).unwrap();
        let nearest = |h, w| buckets.nearest(size(h, w)).to_string();
        assert_eq!(nearest(1000, 1000), "1024x1024");
        assert_eq!(nearest(1080, 1920), "1360x768"); // 1.7708 for 1.7778
        assert_eq!(nearest(1920, 1080), "768x1360");
        assert_eq!(nearest(100, 3000), "2048x512");
        assert_eq!(nearest(3000, 1), "512x2048");
        assert!((buckets.nearest(size(100, 800)).kept(size(100, 800)) - 0.5).abs() < 1e-12);
        assert_eq!(buckets.nearest(size(512, 512)).scale(size(512, 512)), 2.0);
    }

    #[test]
    fn no_bucket_is_nearer_than_the_one_chosen() {
        let buckets = Buckets::new(768, 16).unwrap();
        for (h, w) in [(333, 500), (47, 64), (901, 900), (1, 2), (2160, 3840)] {
            let error = |b: Bucket| (b.aspect() / size(h, w).aspect()).ln().abs();
            let chosen = error(buckets.nearest(size(h, w)));
            assert!(buckets.all().iter().all(|&b| error(b) >= chosen));
        }
    }

    #[test]
    fn impossible_sizes_are_refused() {
        assert!(Bucket::new(0, 16).is_err());
        assert!(Bucket::new(16, 24).is_err());
        assert!(Buckets::new(8, 16).unwrap_err().to_string().contains("expected at least 16"));
        assert!(Buckets::new(512, 24).is_err());
    }
}
