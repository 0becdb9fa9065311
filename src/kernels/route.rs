//! Which of an op's implementations runs.
//!
//! Every op of the training path has two: a CPU kernel over slices, and a composition of candle's tensor operations
//! with the same hand-derived backward, which runs on any candle device. A tensor on the CPU takes the kernel, any
//! other the composition, and there the steps for which a kernel of our own was compiled take that
//! (`kernels::cuda`, with the feature of that name).

use candle_core::Tensor;
use std::cell::Cell;

thread_local! {
    static COMPOSED_ONLY: Cell<bool> = const { Cell::new(false) };
}

/// Runs `f` with every op composed of candle's operations, on the CPU too and without any kernel of our own: what the
/// kernels are tested against.
pub fn composed_only<R>(f: impl FnOnce() -> R) -> R {
    struct Restore(bool);
    impl Drop for Restore {
        fn drop(&mut self) {
            COMPOSED_ONLY.with(|c| c.set(self.0));
        }
    }
    let _restore = Restore(COMPOSED_ONLY.with(|c| c.replace(true)));
    f()
}

/// Whether kernels of our own are switched off on this thread.
pub(super) fn is_composed_only() -> bool {
    COMPOSED_ONLY.with(Cell::get)
}

/// Whether an op on `tensor` takes its composed form.
pub fn is_composed(tensor: &Tensor) -> bool {
    !tensor.device().is_cpu() || is_composed_only()
}
