//! How the weight of a linear layer is held.

use crate::error::Result;
use crate::kernels::cpu::view;
use crate::kernels::int8::Int8Matrix;
use crate::kernels::swap::Swapped;
use crate::kernels::tape::Value;
use candle_core::{DType, Tensor};
use std::ops::Range;

/// The weight (out, in) of a linear layer.
#[derive(Clone)]
pub enum Weight {
    /// f32 or bf16: a constant, or a leaf that is trained.
    Float(Value),
    /// Frozen, in int8.
    Int8(Int8Matrix),
    /// Frozen, as either of these, in host memory until it is used.
    Swapped(Swapped),
}

impl From<Value> for Weight {
    fn from(value: Value) -> Self {
        Self::Float(value)
    }
}

impl Weight {
    /// (out, in).
    pub fn dims(&self) -> (usize, usize) {
        match self {
            Self::Float(value) => (value.dims()[0], value.dims()[1]),
            Self::Int8(matrix) => matrix.dims(),
            Self::Swapped(weight) => weight.dims(),
        }
    }

    /// The value on the tape, if it is one.
    pub fn value(&self) -> Option<&Value> {
        match self {
            Self::Float(value) => Some(value),
            Self::Int8(_) | Self::Swapped(_) => None,
        }
    }

    /// Whether it is trained.
    pub fn needs_grad(&self) -> bool {
        self.value().is_some_and(Value::needs_grad)
    }

    /// The whole weight in `dtype`, on its device. To be used at once: of a weight that is swapped it may be its buffer.
    pub(super) fn dense(&self, dtype: DType) -> Result<Tensor> {
        match self {
            Self::Float(value) => Ok(value.tensor().to_dtype(dtype)?),
            Self::Int8(matrix) => matrix.dequantise(dtype),
            Self::Swapped(weight) => weight.reach()?.dense(dtype),
        }
    }

    /// Calls `f` with ranges of rows and their values in f32, from the first to the last; on the CPU. Floats come all at
    /// once, int8 in panels of bounded size, so that it is never there in f32 as a whole.
    pub(super) fn for_each_panel(&self, mut f: impl FnMut(Range<usize>, &[f32])) -> Result<()> {
        match self {
            Self::Float(value) => {
                f(0..self.dims().0, &view(value.tensor())?);
                Ok(())
            }
            Self::Int8(matrix) => matrix.for_each_panel(f),
            Self::Swapped(weight) => weight.reach()?.for_each_panel(f),
        }
    }
}
