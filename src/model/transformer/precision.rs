//! In what types a network is held and run.

use crate::config::BaseDtype;
use candle_core::DType;
use std::fmt;

/// In what types a network is held and run.
///
/// With `int8` the matrices of the blocks, 99.7 % of the published model, are held as int8 in blocks of 32: attention, MLP and
/// modulation. What is read once a step stays float: `img_in`, `txt_in`, the time embedding, `norm_out` and `proj_out`; so do
/// norms and biases.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Precision {
    /// Type of the base weights that are held as floats: f32 or bf16.
    pub weights: DType,
    /// Whether the matrices of the blocks are held in int8.
    pub int8: bool,
    /// Type of activations: f32 or bf16. Adapters are f32 in any case.
    pub compute: DType,
}

impl Precision {
    /// One float type for weights and activations.
    pub fn uniform(dtype: DType) -> Self {
        Self { weights: dtype, int8: false, compute: dtype }
    }

    /// Weights as a config or a command line names them, activations in `compute`. `auto` is the type of the activations, and
    /// so is what int8 leaves as floats.
    pub fn of(base: BaseDtype, compute: DType) -> Self {
        let weights = match base {
            BaseDtype::F32 => DType::F32,
            BaseDtype::Bf16 => DType::BF16,
            BaseDtype::Auto | BaseDtype::Int8 => compute,
        };
        Self { weights, int8: base == BaseDtype::Int8, compute }
    }

    /// How the base weights are held; never `auto`.
    pub fn base(self) -> BaseDtype {
        match self.weights {
            _ if self.int8 => BaseDtype::Int8,
            DType::F32 => BaseDtype::F32,
            _ => BaseDtype::Bf16,
        }
    }

    /// What the base weights are called.
    pub fn base_name(self) -> &'static str {
        self.base().as_str()
    }
}

impl fmt::Display for Precision {
    /// The type of the activations, and, if it is another, that of the weights.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.compute.as_str())?;
        if self.base_name() == self.compute.as_str() {
            Ok(())
        } else {
            write!(f, " with weights in {}", self.base_name())
        }
    }
}
