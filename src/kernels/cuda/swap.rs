//! Copies from pinned host memory on a stream of their own, beside the stream that computes.
//!
//! The stream is made with the driver's own call: candle's `CudaContext::new_stream` would turn on cudarc's tracking of events for
//! every tensor of the process.

use crate::error::{Error, Result};
use crate::kernels::cuda::gpu::{address, driver};
use candle_core::cuda_backend::cudarc::driver::{CudaContext, result, sys};
use candle_core::{CpuStorage, Device, Storage, Tensor};
use std::ffi::c_void;
use std::sync::Arc;

/// Values that a copy can read while the host does something else.
pub(in crate::kernels) struct Pinned {
    context: Arc<CudaContext>,
    pointer: *mut c_void,
    bytes: usize,
}

impl Pinned {
    /// The values of a contiguous tensor on the CPU. Errors: the host has no memory to pin.
    pub(in crate::kernels) fn of(tensor: &Tensor, device: &Device) -> Result<Self> {
        let context = device.as_cuda_device()?.cuda_stream().context().clone();
        driver("make its context current", context.bind_to_thread())?;
        let (storage, layout) = tensor.storage_and_layout();
        let Storage::Cpu(storage) = &*storage else {
            return Err(Error::run("weights to be pinned are not on the CPU"));
        };
        let (first, count) = (layout.start_offset(), tensor.elem_count());
        let size = tensor.dtype().size_in_bytes();
        let from: *const c_void = match storage {
            CpuStorage::F32(v) => v[first..first + count].as_ptr().cast(),
            CpuStorage::BF16(v) => v[first..first + count].as_ptr().cast(),
            CpuStorage::F16(v) => v[first..first + count].as_ptr().cast(),
            CpuStorage::U8(v) => v[first..first + count].as_ptr().cast(),
            _ => return Err(Error::run(format!("weights of {} are not swapped", tensor.dtype().as_str()))),
        };
        let bytes = count * size;
        // SAFETY: nothing reads the memory before it is written below.
        let pointer = driver("pin host memory", unsafe { result::malloc_host(bytes, 0) }).map_err(|e| {
            e.hint("swapped blocks wait in the memory of the machine: swap fewer, or hold them in int8")
        })?;
        // SAFETY: the slices above have shown that `from` has as many bytes, and the new memory overlaps nothing.
        unsafe { std::ptr::copy_nonoverlapping(from.cast::<u8>(), pointer.cast::<u8>(), bytes) };
        Ok(Self { context, pointer, bytes })
    }
}

impl Drop for Pinned {
    fn drop(&mut self) {
        let _ = self.context.bind_to_thread();
        // SAFETY: the pointer is from `malloc_host`; a lane, which waits for its copies when it is dropped, goes before what
        // they read.
        let _ = unsafe { result::free_host(self.pointer) };
    }
}

/// A stream for copies into two buffers, in order with the computing stream.
pub(in crate::kernels) struct Lane {
    context: Arc<CudaContext>,
    computing: sys::CUstream,
    copying: sys::CUstream,
    /// Recorded on the computing stream before a copy: what it launched so far has read the buffer.
    used: sys::CUevent,
    /// Recorded on the copying stream after the copy into each buffer.
    copied: [sys::CUevent; 2],
}

impl Lane {
    /// For the GPU of `device`.
    pub(in crate::kernels) fn new(device: &Device) -> Result<Self> {
        let stream = device.as_cuda_device()?.cuda_stream();
        let context = stream.context().clone();
        driver("make its context current", context.bind_to_thread())?;
        let event = || driver("make an event", result::event::create(sys::CUevent_flags::CU_EVENT_DISABLE_TIMING));
        let kind = result::stream::StreamKind::NonBlocking;
        Ok(Self {
            computing: stream.cu_stream(),
            copying: driver("make a stream", result::stream::create(kind))?,
            used: event()?,
            copied: [event()?, event()?],
            context,
        })
    }

    /// Starts copies into `buffer`, once what the computing stream was given so far is done.
    pub(in crate::kernels) fn start<'a>(
        &self,
        buffer: usize,
        copies: impl Iterator<Item = (&'a Pinned, &'a Tensor)>,
    ) -> Result<()> {
        driver("make its context current", self.context.bind_to_thread())?;
        // SAFETY: streams and events are made in `new` and live as long as this; the computing stream as long as the device,
        // which the buffers' tensors hold.
        driver("order its streams", unsafe {
            result::event::record(self.used, self.computing)
                .and_then(|()| result::stream::wait_event(self.copying, self.used, WAIT))
        })?;
        for (from, to) in copies {
            let bytes = to.elem_count() * to.dtype().size_in_bytes();
            if bytes != from.bytes {
                return Err(Error::run("a swapped weight does not fit its buffer").expected(bytes, from.bytes));
            }
            let to = address(to)?;
            // SAFETY: both ends have `bytes` bytes. The source is not moved or changed while it lives, and the destination not
            // read before `wait_for`; both are given back after this lane, which waits for its copies.
            driver("copy weights", unsafe {
                sys::cuMemcpyHtoDAsync_v2(to, from.pointer.cast_const(), bytes, self.copying).result()
            })?;
        }
        // SAFETY: as above.
        driver("order its streams", unsafe { result::event::record(self.copied[buffer], self.copying) })
    }

    /// Lets the computing stream wait for the last copy into `buffer`; the host goes on.
    pub(in crate::kernels) fn wait_for(&self, buffer: usize) -> Result<()> {
        driver("make its context current", self.context.bind_to_thread())?;
        // SAFETY: as in `start`.
        driver("order its streams", unsafe { result::stream::wait_event(self.computing, self.copied[buffer], WAIT) })
    }
}

const WAIT: sys::CUevent_wait_flags = sys::CUevent_wait_flags::CU_EVENT_WAIT_DEFAULT;

impl Drop for Lane {
    fn drop(&mut self) {
        let _ = self.context.bind_to_thread();
        // SAFETY: all four are made in `new` and destroyed here alone; after the wait no copy is under way.
        unsafe {
            let _ = result::stream::synchronize(self.copying);
            let _ = result::stream::destroy(self.copying);
            for event in [self.used, self.copied[0], self.copied[1]] {
                let _ = result::event::destroy(event);
            }
        }
    }
}
