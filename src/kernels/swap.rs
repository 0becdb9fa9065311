//! Frozen weights that wait in host memory, of which the device holds two groups at a time.
//!
//! A group is what is used together, one after the other: the weights of a block. There are two buffers on the device. When a
//! group is reached, the one that comes next is copied into the other buffer while the device computes with this one; what
//! comes next follows from the order so far: up in a forward pass, down in a backward pass. Frozen weights do not change,
//! so nothing is ever copied back.
//!
//! On a GPU the groups wait in pinned memory, and a stream of their own copies them, in order with the computing stream by
//! events ([`cuda::swap`](super::cuda)). On the CPU a copy is made on the spot: no memory is saved there, but the same code
//! runs, and its results are those of weights that never moved, bit for bit.

use crate::error::{Error, Result};
#[cfg(feature = "cuda")]
use crate::kernels::cuda::swap::{Lane, Pinned};
use crate::kernels::int8::Int8Matrix;
use crate::kernels::tape::Value;
use crate::kernels::tensors::assign;
use crate::kernels::weight::Weight;
use candle_core::{DType, Device, Tensor};
use std::cell::RefCell;
use std::rc::Rc;

/// Groups of frozen weights and the two buffers that they take turns in.
pub struct Swap {
    device: Device,
    inner: RefCell<Inner>,
}

/// A weight of a group.
#[derive(Clone)]
pub struct Swapped {
    swap: Rc<Swap>,
    group: usize,
    /// Its place in the group.
    index: usize,
    dims: (usize, usize),
}

struct Inner {
    /// First, so that no copy is under way any more when what it reads and writes is given back.
    copies: Copies,
    groups: Vec<Group>,
    /// None before the first group is reached.
    buffers: Vec<Buffer>,
    /// The group that was reached last.
    last: Option<usize>,
    /// Groups that were copied so far.
    copied: usize,
}

/// What makes the copies.
enum Copies {
    /// Done at once.
    AtOnce,
    #[cfg(feature = "cuda")]
    Beside(Lane),
}

/// The weights of a group, as they wait: what each one is, and their values tensor by tensor.
#[derive(Default)]
struct Group {
    kinds: Vec<Kind>,
    values: Vec<Waiting>,
}

/// What a weight is made of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Float(DType, usize, usize),
    Int8(usize, usize),
}

enum Waiting {
    Tensor(Tensor),
    #[cfg(feature = "cuda")]
    Pinned(Pinned),
}

struct Buffer {
    weights: Vec<Weight>,
    /// The tensors of all weights.
    tensors: Vec<Tensor>,
    /// The group whose values are there, or are being copied.
    holds: Option<usize>,
}

impl Swap {
    /// For weights that `device` computes with. Errors: those of the CUDA driver.
    pub fn new(device: &Device) -> Result<Rc<Self>> {
        let copies = match device {
            #[cfg(feature = "cuda")]
            Device::Cuda(_) => Copies::Beside(Lane::new(device)?),
            _ => Copies::AtOnce,
        };
        let inner = Inner { copies, groups: Vec::new(), buffers: Vec::new(), last: None, copied: 0 };
        Ok(Rc::new(Self { device: device.clone(), inner: RefCell::new(inner) }))
    }

    /// Opens the next group.
    pub fn begin_group(&self) {
        self.inner.borrow_mut().groups.push(Group::default());
    }

    /// Moves a frozen weight, wherever it is, into the group that was opened last.
    ///
    /// Errors: another weight than the first group has in its place; no group was opened; the driver gives no pinned memory.
    pub fn add(self: &Rc<Self>, weight: Weight) -> Result<Weight> {
        let mut inner = self.inner.borrow_mut();
        let (kind, tensors) = match &weight {
            Weight::Float(value) => {
                let (n, k) = value.tensor().dims2()?;
                (Kind::Float(value.dtype(), n, k), vec![value.tensor().clone()])
            }
            Weight::Int8(matrix) => {
                let (n, k) = matrix.dims();
                (Kind::Int8(n, k), matrix.parts().into_iter().cloned().collect())
            }
            Weight::Swapped(_) => {
                return Err(Error::run("a weight that waits in host memory was to be moved there again"));
            }
        };
        drop(weight);
        let Some(group) = inner.groups.len().checked_sub(1) else {
            return Err(Error::run("a weight was to be swapped before a group of weights was opened"));
        };
        let index = inner.groups[group].kinds.len();
        if let Some(first) = inner.groups[0].kinds.get(index)
            && group > 0
            && *first != kind
        {
            return Err(
                Error::run("blocks that are swapped are not alike").expected(format!("{first:?}"), format!("{kind:?}"))
            );
        }
        let values: Vec<Waiting> = tensors.into_iter().map(|t| self.wait(t)).collect::<Result<_>>()?;
        let open = &mut inner.groups[group];
        open.kinds.push(kind);
        open.values.extend(values);
        let (Kind::Float(_, n, k) | Kind::Int8(n, k)) = kind;
        Ok(Weight::Swapped(Swapped { swap: self.clone(), group, index, dims: (n, k) }))
    }

    fn wait(&self, tensor: Tensor) -> Result<Waiting> {
        let on_host = tensor.to_device(&Device::Cpu)?.contiguous()?;
        #[cfg(feature = "cuda")]
        if let Device::Cuda(_) = &self.device {
            return Ok(Waiting::Pinned(Pinned::of(&on_host, &self.device)?));
        }
        Ok(Waiting::Tensor(on_host))
    }

    /// Groups that were copied into a buffer so far.
    pub fn copied(&self) -> usize {
        self.inner.borrow().copied
    }
}

impl Swapped {
    /// (out, in).
    pub fn dims(&self) -> (usize, usize) {
        self.dims
    }

    /// The weight on the device, good until another group is reached.
    pub(super) fn reach(&self) -> Result<Weight> {
        let mut inner = self.swap.inner.borrow_mut();
        let buffer = inner.reach(self.group, &self.swap.device)?;
        Ok(inner.buffers[buffer].weights[self.index].clone())
    }
}

impl Inner {
    /// The buffer with the values of `group`, after everything that this takes has been started.
    fn reach(&mut self, group: usize, device: &Device) -> Result<usize> {
        let holding = |buffers: &[Buffer], group: Option<usize>| {
            group.and_then(|group| buffers.iter().position(|b| b.holds == Some(group)))
        };
        if self.last == Some(group) {
            return Ok(holding(&self.buffers, self.last).expect("the group reached last is not copied over"));
        }
        if self.buffers.is_empty() {
            self.buffers = (0..2).map(|_| self.groups[0].buffer(device)).collect::<Result<_>>()?;
        }
        let here = match holding(&self.buffers, Some(group)) {
            Some(here) => here,
            None => {
                let free = holding(&self.buffers, self.last).map_or(0, |last| 1 - last);
                self.start(free, group)?;
                free
            }
        };
        match &self.copies {
            Copies::AtOnce => {}
            #[cfg(feature = "cuda")]
            Copies::Beside(lane) => lane.wait_for(here)?,
        }
        if let Some(next) = self.after(group)
            && self.buffers[1 - here].holds != Some(next)
        {
            self.start(1 - here, next)?;
        }
        self.last = Some(group);
        Ok(here)
    }

    /// The group that comes after `group`, as it seems: passes go up from the first group and down from the last.
    fn after(&self, group: usize) -> Option<usize> {
        let up = match self.last {
            _ if group == 0 => true,
            _ if group + 1 == self.groups.len() => false,
            None => true,
            Some(last) => group > last,
        };
        if up { Some(group + 1).filter(|next| *next < self.groups.len()) } else { group.checked_sub(1) }
    }

    /// Starts to copy `group` into a buffer. What was computed with the buffer's values has been launched before.
    fn start(&mut self, buffer: usize, group: usize) -> Result<()> {
        let to = &mut self.buffers[buffer];
        // Unknown if this fails half way.
        to.holds = None;
        match &self.copies {
            Copies::AtOnce => {
                for (to, from) in to.tensors.iter().zip(&self.groups[group].values) {
                    match from {
                        Waiting::Tensor(from) => assign(to, from)?,
                        #[cfg(feature = "cuda")]
                        Waiting::Pinned(_) => unreachable!("on the CPU nothing is pinned"),
                    }
                }
            }
            #[cfg(feature = "cuda")]
            Copies::Beside(lane) => {
                let pinned = self.groups[group].values.iter().map(|waiting| match waiting {
                    Waiting::Pinned(pinned) => pinned,
                    Waiting::Tensor(_) => unreachable!("for a GPU everything is pinned"),
                });
                lane.start(buffer, pinned.zip(&to.tensors))?;
            }
        }
        to.holds = Some(group);
        self.copied += 1;
        Ok(())
    }
}

impl Group {
    /// A buffer for the weights of such a group.
    fn buffer(&self, device: &Device) -> Result<Buffer> {
        let (mut weights, mut tensors) = (Vec::new(), Vec::new());
        for kind in &self.kinds {
            weights.push(match *kind {
                Kind::Float(dtype, n, k) => {
                    let tensor = Tensor::zeros((n, k), dtype, device)?;
                    tensors.push(tensor.clone());
                    Weight::Float(Value::constant(tensor))
                }
                Kind::Int8(n, k) => {
                    let matrix = Int8Matrix::zeros((n, k), device)?;
                    tensors.extend(matrix.parts().into_iter().cloned());
                    Weight::Int8(matrix)
                }
            });
        }
        Ok(Buffer { weights, tensors, holds: None })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernels::testing::randn;

    /// `n` groups of a float weight and one in int8; also the weights as they were.
    fn groups(n: usize) -> (Rc<Swap>, Vec<[Weight; 2]>, Vec<[Weight; 2]>) {
        let swap = Swap::new(&Device::Cpu).unwrap();
        let own: Vec<[Weight; 2]> = (0..n as u64)
            .map(|i| {
                let float = Value::constant(randn(2 * i, &[6, 40], 1.0));
                let int8 = Int8Matrix::quantise("w", &randn(2 * i + 1, &[5, 70], 1.0)).unwrap();
                [float.into(), Weight::Int8(int8)]
            })
            .collect();
        let swapped = own.iter().map(|group| {
            swap.begin_group();
            group.clone().map(|weight| swap.add(weight).unwrap())
        });
        let swapped = swapped.collect();
        (swap, own, swapped)
    }

    fn values(weight: &Weight) -> Vec<Vec<f32>> {
        weight.dense(DType::F32).unwrap().to_vec2().unwrap()
    }

    /// Uses the groups in `order`, each weight as it comes and once more, and checks what is read. How many were copied.
    fn run(n: usize, order: &[usize]) -> usize {
        let (swap, own, swapped) = groups(n);
        for &group in order {
            for i in [0, 1, 0] {
                assert_eq!(swapped[group][i].dims(), own[group][i].dims());
                assert!(values(&swapped[group][i]) == values(&own[group][i]), "{order:?} at {group}");
            }
        }
        swap.copied()
    }

    #[test]
    fn every_group_is_read_as_it_was_in_any_order() {
        let passes = [0, 1, 2, 3, 4, 4, 3, 2, 1, 0];
        // Up all five, down all but the two that are there still; from the second time on, up without the two that are.
        assert_eq!(run(5, &passes), 5 + 3);
        assert_eq!(run(5, &[passes, passes].concat()), 5 + 3 + 3 + 3);
        // Passes that only go up, with or without gradients.
        assert_eq!(run(4, &[0, 1, 2, 3, 0, 1, 2, 3]), 4 + 4);
        assert_eq!(run(2, &[0, 1, 1, 0, 0, 1, 1, 0]), 2);
        assert_eq!(run(1, &[0, 0]), 1);
        run(6, &[5, 0, 3, 1, 4, 2, 2, 5, 1, 0, 5, 3]);
    }

    #[test]
    fn the_next_group_is_there_before_it_is_asked_for() {
        let (swap, _, swapped) = groups(4);
        let reach = |group: usize| {
            swapped[group].iter().for_each(|weight| drop(values(weight)));
            let inner = swap.inner.borrow();
            let mut holds: Vec<usize> = inner.buffers.iter().filter_map(|b| b.holds).collect();
            holds.sort();
            holds
        };
        let up = [0, 1, 2, 3].map(reach);
        assert_eq!(up, [[0, 1], [1, 2], [2, 3], [2, 3]]);
        let down = [3, 2, 1, 0].map(reach);
        assert_eq!(down, [[2, 3], [1, 2], [0, 1], [0, 1]]);
        // What is copied into is the other buffer, never the one that was just read.
        assert_eq!(reach(1), [1, 2]);
    }

    #[test]
    fn groups_that_are_not_alike_are_refused() {
        let swap = Swap::new(&Device::Cpu).unwrap();
        let weight = |n: usize| Weight::from(Value::constant(randn(0, &[n, 4], 1.0)));
        assert!(swap.add(weight(3)).is_err());
        swap.begin_group();
        let first = swap.add(weight(3)).unwrap();
        swap.begin_group();
        let error = swap.add(weight(2)).err().expect("refused").to_string();
        assert!(error.contains("not alike"), "{error}");
        assert!(swap.add(first).is_err());
    }
}
