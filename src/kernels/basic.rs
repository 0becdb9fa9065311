//! Additions and look-ups.

use crate::error::Result;
use crate::kernels::tape::{Value, record1};
use crate::kernels::tensors;
use candle_core::Tensor;

/// `x + y` for values of one shape.
pub fn add(x: &Value, y: &Value) -> Result<Value> {
    let out = tensors::add(x.tensor(), y.tensor())?;
    Ok(record1(&[x, y], out, |grad| Ok(vec![Some(grad.clone()), Some(grad)])))
}

/// Rows of a table (N, D) by index: (rows, D).
pub fn embedding(table: &Value, rows: &[usize]) -> Result<Value> {
    let ids: Vec<u32> = rows.iter().map(|&r| r as u32).collect();
    let ids = Tensor::new(ids, table.tensor().device())?;
    let contiguous = table.tensor().contiguous()?;
    let out = contiguous.index_select(&ids, 0)?;
    Ok(record1(&[table], out, move |grad| {
        Ok(vec![Some(contiguous.zeros_like()?.index_add(&ids, &grad.contiguous()?, 0)?)])
    }))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernels::testing::{check_both, randn};

    #[test]
    fn sums_and_look_ups_equal_their_twins() {
        check_both(
            &[randn(0, &[3, 4], 1.0), randn(1, &[5, 4], 1.0)],
            5e-6,
            |v| Ok(vec![add(&v[0], &embedding(&v[1], &[4, 0, 4])?)?]),
            |t| Ok(vec![(&t[0] + t[1].index_select(&Tensor::new(&[4u32, 0, 4], t[1].device())?, 0)?)?]),
        );
    }
}
