//! Maximum pooling, and joining the channels of images.

use crate::error::{Error, Result};
use crate::kernels::cpu::{self, par_rows, uninit, view};
use crate::kernels::tape::{Value, record1};
use candle_core::Tensor;
use rayon::prelude::*;

/// The largest of each 2x2 square, squares side by side; an odd last row or column is left out. The gradient goes to
/// the first of equal largest elements, upper row first, as in PyTorch.
///
/// Shapes: `x` (B, H, W, C) -> (B, H/2, W/2, C).
pub fn max_pool2x2(x: &Value) -> Result<Value> {
    let (b, h, w, c) = x.tensor().dims4()?;
    let (out_h, out_w) = (h / 2, w / 2);
    if out_h == 0 || out_w == 0 {
        return Err(
            Error::run("an image is too small to be pooled").expected("2 x 2 pixels or more", format!("{w} x {h}"))
        );
    }
    let xs = view(x.tensor())?;
    let mut out = uninit(b * out_h * out_w * c);
    out.par_chunks_exact_mut(out_w * c).enumerate().for_each(|(row, out)| {
        let (n, oy) = (row / out_h, row % out_h);
        for (ox, out) in out.chunks_exact_mut(c).enumerate() {
            let [p, q, r, s] = square(&xs, n, oy, ox, [h, w, c]);
            for (j, out) in out.iter_mut().enumerate() {
                *out = p[j].max(q[j]).max(r[j].max(s[j]));
            }
        }
    });
    drop(xs);
    let y = cpu::from_f32(out, (b, out_h, out_w, c), x.dtype())?;
    let kept = x.tensor().clone();
    Ok(record1(&[x], y, move |grad| {
        let (xs, dy) = (view(&kept)?, view(&grad)?);
        let mut dx = vec![0f32; xs.len()];
        // Two input rows make one output row; an odd last row of an image gets nothing.
        dx.par_chunks_exact_mut(h * w * c).enumerate().for_each(|(n, dx)| {
            for oy in 0..out_h {
                for ox in 0..out_w {
                    let square = square(&xs, n, oy, ox, [h, w, c]);
                    let dy = &dy[((n * out_h + oy) * out_w + ox) * c..][..c];
                    for j in 0..c {
                        let mut best = 0;
                        for i in 1..4 {
                            if square[i][j] > square[best][j] {
                                best = i;
                            }
                        }
                        dx[((2 * oy + best / 2) * w + 2 * ox + best % 2) * c + j] = dy[j];
                    }
                }
            }
        });
        Ok(vec![Some(cpu::from_f32(dx, kept.shape(), grad.dtype())?)])
    }))
}

/// The four pixels of a square: upper left, upper right, lower left, lower right.
fn square(x: &[f32], n: usize, oy: usize, ox: usize, [h, w, c]: [usize; 3]) -> [&[f32]; 4] {
    let pixel = |y: usize, x_: usize| &x[((n * h + y) * w + x_) * c..][..c];
    let (y, x_) = (2 * oy, 2 * ox);
    [pixel(y, x_), pixel(y, x_ + 1), pixel(y + 1, x_), pixel(y + 1, x_ + 1)]
}

/// Images of one size side by side in their channels.
///
/// Shapes: each (B, H, W, C_i) -> (B, H, W, sum of C_i). Errors: images of different sizes.
pub fn join_channels(images: &[&Value]) -> Result<Value> {
    let (b, h, w, _) = images[0].tensor().dims4()?;
    if let Some(other) = images.iter().find(|v| v.dims().len() != 4 || v.dims()[..3] != [b, h, w]) {
        return Err(Error::run("images of different sizes cannot be joined")
            .expected(format!("{:?} as height and width", [h, w]), format!("{:?}", other.dims())));
    }
    let widths: Vec<usize> = images.iter().map(|v| v.dims()[3]).collect();
    let total: usize = widths.iter().sum();
    let views = images.iter().map(|v| view(v.tensor())).collect::<Result<Vec<_>>>()?;
    let mut out = uninit(b * h * w * total);
    par_rows(&mut out, total, |i, pixel| {
        let mut start = 0;
        for (view, &width) in views.iter().zip(&widths) {
            pixel[start..start + width].copy_from_slice(&view[i * width..][..width]);
            start += width;
        }
    });
    drop(views);
    let y = cpu::from_f32(out, (b, h, w, total), images[0].dtype())?;
    Ok(record1(images, y, move |grad| {
        let mut start = 0;
        let part = |&width: &usize| {
            start += width;
            grad.narrow(3, start - width, width)?.contiguous().map(Some)
        };
        Ok(widths.iter().map(part).collect::<candle_core::Result<Vec<Option<Tensor>>>>()?)
    }))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernels::testing::{check, randn};

    #[test]
    fn pooling_equals_its_twin_on_even_and_odd_sizes() {
        for dims in [[2, 4, 6, 5], [1, 5, 7, 3]] {
            let [b, h, w, c] = dims;
            check(
                &[randn(0, &dims, 1.0)],
                1e-6,
                |v| Ok(vec![max_pool2x2(&v[0])?]),
                // By `max`, whose gradient candle has; its pooling has none.
                |t| {
                    let x = t[0].narrow(1, 0, h / 2 * 2)?.narrow(2, 0, w / 2 * 2)?;
                    let x = x.reshape((b, h / 2, 2, w / 2, 2 * c))?.max(2)?;
                    Ok(vec![x.reshape((b, h / 2, w / 2, 2, c))?.max(3)?])
                },
            );
        }
    }

    #[test]
    fn of_equal_largest_elements_the_first_gets_the_gradient() {
        let x = Value::leaf(Tensor::new(&[[[[1f32], [1.]], [[1.], [0.]]]], &candle_core::Device::Cpu).unwrap());
        let y = max_pool2x2(&x).unwrap();
        let seed = (y.tensor() * 5.0).unwrap();
        let grad = crate::kernels::backward(vec![(y, seed)]).unwrap().take(&x).unwrap();
        assert_eq!(grad.flatten_all().unwrap().to_vec1::<f32>().unwrap(), [5., 0., 0., 0.]);
    }

    #[test]
    fn joined_channels_equal_their_twin() {
        check(
            &[randn(0, &[2, 3, 4, 2], 1.0), randn(1, &[2, 3, 4, 5], 1.0), randn(2, &[2, 3, 4, 1], 1.0)],
            1e-6,
            |v| Ok(vec![join_channels(&[&v[0], &v[1], &v[2]])?]),
            |t| Ok(vec![Tensor::cat(t, 3)?]),
        );
        let other = Value::constant(randn(3, &[2, 3, 5, 2], 1.0));
        assert!(join_channels(&[&Value::constant(randn(0, &[2, 3, 4, 2], 1.0)), &other]).is_err());
    }
}
