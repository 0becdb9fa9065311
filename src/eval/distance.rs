//! How far two sets of feature vectors are from each other: the Fréchet distance and the kernel distance.

use crate::error::Result;
use crate::eval::singular::Matrix;
use candle_core::{Device, Tensor};

/// Below this many pictures the Fréchet distance of 2048 features is biased upwards and its covariance singular.
pub const FEW: usize = 2048;

/// The Fréchet distance of the normal distributions fitted to the rows of `x` and `y` (FID, where rows are InceptionV3
/// features): `|m1 - m2|^2 + tr S1 + tr S2 - 2 tr (S1 S2)^(1/2)`. `None` for fewer than two rows.
///
/// The last trace is the sum of the singular values of `X Y'` for the centred rows X and Y, over
/// `sqrt((n1 - 1)(n2 - 1))`: `S1 S2` has the eigenvalues of `(X Y')(X Y')'`. No root of a matrix is needed, and singular
/// covariances are no special case. Source of the definition and of the divisors n - 1:
/// <https://github.com/mseitzer/pytorch-fid/blob/0.3.0/src/pytorch_fid/fid_score.py>.
pub fn frechet(x: &Matrix, y: &Matrix) -> Result<Option<f64>> {
    assert_eq!(x.columns, y.columns, "features of one network");
    if x.rows < 2 || y.rows < 2 {
        return Ok(None);
    }
    let ((mean_x, x), (mean_y, y)) = (centred(x), centred(y));
    let divisor = |m: &Matrix| (m.rows - 1) as f64;
    let spread = |m: &Matrix| m.values.iter().map(|v| v * v).sum::<f64>() / divisor(m);
    let apart: f64 = mean_x.iter().zip(&mean_y).map(|(a, b)| (a - b).powi(2)).sum();
    let (traces, divisors) = (spread(&x) + spread(&y), (divisor(&x) * divisor(&y)).sqrt());
    // With more rows than columns the triangle says the same in less.
    let short = |m: Matrix| if m.rows > m.columns { m.triangle() } else { m };
    let root = products(&short(x), &short(y))?.nuclear_norm() / divisors;
    Ok(Some(apart + traces - 2.0 * root))
}

/// The squared maximum mean discrepancy under the kernel `(x.y / d + 1)^3` (KID), the unbiased estimate over all rows:
/// it may be below zero. `None` for fewer than two rows.
///
/// Source: Binkowski et al., "Demystifying MMD GANs" (2018), as in
/// <https://github.com/GaParmar/clean-fid/blob/v0.1.35/cleanfid/fid.py> with one subset of everything.
pub fn kernel_distance(x: &Matrix, y: &Matrix) -> Result<Option<f64>> {
    assert_eq!(x.columns, y.columns, "features of one network");
    if x.rows < 2 || y.rows < 2 {
        return Ok(None);
    }
    let d = x.columns as f64;
    let kernel = |a: &Matrix, b: &Matrix| -> Result<Matrix> {
        let mut k = products(a, b)?;
        k.values.iter_mut().for_each(|v| *v = (*v / d + 1.0).powi(3));
        Ok(k)
    };
    let within = |m: &Matrix| -> Result<f64> {
        let k = kernel(m, m)?;
        let own: f64 = k.values.iter().step_by(m.rows + 1).sum();
        Ok((k.values.iter().sum::<f64>() - own) / (m.rows * (m.rows - 1)) as f64)
    };
    let between = kernel(x, y)?.values.iter().sum::<f64>() / (x.rows * y.rows) as f64;
    Ok(Some(within(x)? + within(y)? - 2.0 * between))
}

/// The mean of the rows, and the rows less it.
fn centred(m: &Matrix) -> (Vec<f64>, Matrix) {
    let mut mean = vec![0.0; m.columns];
    for row in m.values.chunks_exact(m.columns) {
        mean.iter_mut().zip(row).for_each(|(s, v)| *s += v / m.rows as f64);
    }
    let mut centred = m.clone();
    for row in centred.values.chunks_exact_mut(m.columns) {
        row.iter_mut().zip(&mean).for_each(|(v, s)| *v -= s);
    }
    (mean, centred)
}

/// The dot product of every row of `a` with every row of `b`.
fn products(a: &Matrix, b: &Matrix) -> Result<Matrix> {
    let tensor = |m: &Matrix| Tensor::from_slice(&m.values, (m.rows, m.columns), &Device::Cpu);
    let product = tensor(a)?.matmul(&tensor(b)?.t()?)?;
    Ok(Matrix::new(a.rows, b.rows, product.flatten_all()?.to_vec1()?))
}
