//! The parameters that a run trains: an adapter's matrices, or every weight of the transformer.

use crate::adapters::{LoraAdapter, LoraModule};
use crate::error::{Error, Result};
use crate::kernels::linear::Lora;
use crate::kernels::{Gradients, Value, tensors};
use crate::model::transformer::QwenImageTransformer;
use crate::optim::Parameter;
use candle_core::Tensor;
use std::collections::BTreeMap;

/// What an adapter module is beside its two matrices.
struct Module {
    name: String,
    alpha: f64,
    scale: f64,
}

/// Named leaves of the tape, in a fixed order. Their storage is shared with the network, so that an optimizer that
/// writes into it in place trains the network.
pub struct Trainable {
    names: Vec<String>,
    leaves: Vec<Value>,
    modules: Vec<Module>,
}

impl Trainable {
    /// Puts `adapter` on the network's linears, on the network's device, and trains its matrices: `<module>.lora_A.weight` and `.lora_B.weight`,
    /// modules in name order.
    ///
    /// Errors: a module that the network does not have.
    pub fn attach(model: &mut QwenImageTransformer, adapter: &LoraAdapter) -> Result<Self> {
        let mut trainable = Self { names: Vec::new(), leaves: Vec::new(), modules: Vec::new() };
        for (name, module) in &adapter.modules {
            // Own storage: training must not write into the tensors of the caller.
            let own = |t: &Tensor| t.to_device(model.device())?.copy().map(Value::leaf);
            let [a, b] = [own(&module.a), own(&module.b)];
            let lora = Lora { a: a?, b: b?, scale: module.scale };
            trainable.names.extend([format!("{name}.lora_A.weight"), format!("{name}.lora_B.weight")]);
            trainable.leaves.extend([lora.a.clone(), lora.b.clone()]);
            trainable.modules.push(Module { name: name.clone(), alpha: module.alpha, scale: module.scale });
            if !model.set_adapter(name, Some(lora)) {
                return Err(Error::usage(format!("the adapter has a module `{name}` that the model does not have"))
                    .hint("was it trained on another model?"));
            }
        }
        Ok(trainable)
    }

    /// Trains every base weight of a network that was loaded with [`BaseWeights::Trained`].
    ///
    /// [`BaseWeights::Trained`]: crate::model::transformer::BaseWeights::Trained
    pub fn all_weights(model: &QwenImageTransformer) -> Self {
        let (names, leaves) = model.parameters().into_iter().unzip();
        Self { names, leaves, modules: Vec::new() }
    }

    /// Names, in order.
    pub fn names(&self) -> &[String] {
        &self.names
    }

    /// The leaves, in the order of [`Self::names`].
    pub fn leaves(&self) -> &[Value] {
        &self.leaves
    }

    /// The parameters as the optimizer takes them; their storage is the network's.
    pub fn parameters(&self) -> Vec<Parameter> {
        let one = |(name, leaf): (&String, &Value)| Parameter { name: name.clone(), tensor: leaf.tensor().clone() };
        self.names.iter().zip(&self.leaves).map(one).collect()
    }

    /// Whether an adapter is trained, which can be taken off the network.
    pub fn is_adapter(&self) -> bool {
        !self.modules.is_empty()
    }

    /// Takes the adapter off the network that it was attached to: `false`, or puts it back: `true`. The leaves stay the
    /// ones in training.
    pub fn set_active(&self, model: &mut QwenImageTransformer, active: bool) {
        for (module, pair) in self.modules.iter().zip(self.leaves.chunks_exact(2)) {
            let lora = Lora { a: pair[0].clone(), b: pair[1].clone(), scale: module.scale };
            model.set_adapter(&module.name, active.then_some(lora));
        }
    }

    /// Overwrites the values by those of a checkpoint. Errors: a tensor missing or of another shape.
    pub fn restore(&self, tensors: &[(String, Tensor)]) -> Result<()> {
        let saved: BTreeMap<&str, &Tensor> = tensors.iter().map(|(n, t)| (n.as_str(), t)).collect();
        for (name, leaf) in self.names.iter().zip(&self.leaves) {
            match saved.get(name.as_str()) {
                Some(t) if t.dims() == leaf.dims() => tensors::assign(leaf.tensor(), t)?,
                found => {
                    let found = found.map_or("none".into(), |t| format!("shape {:?}", t.dims()));
                    return Err(Error::usage(format!("the checkpoint's `{name}` does not fit the model"))
                        .expected(format!("shape {:?}", leaf.dims()), found));
                }
            }
        }
        Ok(())
    }

    /// Number of trained numbers.
    pub fn num_params(&self) -> usize {
        self.leaves.iter().map(|v| v.tensor().elem_count()).sum()
    }

    /// Takes the gradients of the leaves, in order; `None` where nothing flowed.
    pub fn take_gradients(&self, gradients: &mut Gradients) -> Vec<Option<Tensor>> {
        self.leaves.iter().map(|leaf| gradients.take(leaf)).collect()
    }

    /// The adapter as it stands. The tensors share storage with the ones in training.
    pub fn adapter(&self) -> LoraAdapter {
        let module = |(m, pair): (&Module, &[Value])| {
            let [a, b] = [0, 1].map(|i| pair[i].tensor().clone());
            (m.name.clone(), LoraModule { a, b, alpha: m.alpha, scale: m.scale })
        };
        LoraAdapter { modules: self.modules.iter().zip(self.leaves.chunks_exact(2)).map(module).collect() }
    }
}
