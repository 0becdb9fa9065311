//! A GPU: what it is, its memory, and addresses of tensors on it.

use crate::error::{Error, Result};
use candle_core::cuda_backend::CudaStorageSlice;
use candle_core::cuda_backend::cudarc::driver::{DevicePtr, DriverError, sys};
use candle_core::{CudaDevice, Device, Storage, Tensor};
use std::ffi::c_void;

/// A GPU that candle has opened.
pub struct Gpu(CudaDevice);

pub(super) fn driver<T>(what: &str, result: Result<T, DriverError>) -> Result<T> {
    result.map_err(|e| Error::run(format!("the CUDA driver failed to {what}")).detail(e.to_string()).source(e))
}

impl Gpu {
    /// The GPU behind a device. Errors: the CPU.
    pub fn of(device: &Device) -> Result<Self> {
        Ok(Self(device.as_cuda_device()?.clone()))
    }

    /// Ten times the major and the minor compute capability: 80, 89, 90.
    pub fn capability(&self) -> Result<u32> {
        let (major, minor) = driver("tell the compute capability", self.context().compute_capability())?;
        Ok((10 * major + minor) as u32)
    }

    /// One line: name, compute capability, the CUDA version of the driver, free and total memory.
    pub fn describe(&self) -> Result<String> {
        let name = driver("tell the GPU's name", self.context().name())?;
        let capability = self.capability()?;
        let mut version = 0;
        // SAFETY: the pointer is to a whole integer.
        driver("tell its version", unsafe { sys::cuDriverGetVersion(&mut version) }.result())?;
        let (free, total) = self.memory()?;
        let gib = |bytes: usize| bytes as f64 / (1u64 << 30) as f64;
        Ok(format!(
            "GPU {}: {name} (compute capability {}.{}), driver for CUDA {}.{}, {:.1} of {:.1} GiB free",
            self.context().ordinal(),
            capability / 10,
            capability % 10,
            version / 1000,
            version % 1000 / 10,
            gib(free),
            gib(total)
        ))
    }

    /// Free and total memory in bytes. What [`keep_freed_memory`](Self::keep_freed_memory) holds back is not free.
    pub fn memory(&self) -> Result<(usize, usize)> {
        driver("tell the free memory", self.context().mem_get_info())
    }

    /// Lets the driver's allocator keep what is freed for the next allocation. By default it gives everything back at
    /// each synchronisation, and a step allocates thousands of times.
    pub fn keep_freed_memory(&self) -> Result<()> {
        self.set_pool_attribute(sys::CUmemPool_attribute::CU_MEMPOOL_ATTR_RELEASE_THRESHOLD, u64::MAX)
    }

    /// The most bytes that tensors have held at once since [`reset_peak`](Self::reset_peak).
    pub fn peak_bytes(&self) -> Result<u64> {
        let mut bytes = 0u64;
        let attribute = sys::CUmemPool_attribute::CU_MEMPOOL_ATTR_USED_MEM_HIGH;
        let pointer = (&raw mut bytes).cast::<c_void>();
        // SAFETY: this attribute is a 64-bit integer, and the pointer is to one.
        driver("tell its peak", unsafe { sys::cuMemPoolGetAttribute(self.pool()?, attribute, pointer) }.result())?;
        Ok(bytes)
    }

    /// Starts a new measurement of the peak.
    pub fn reset_peak(&self) -> Result<()> {
        self.set_pool_attribute(sys::CUmemPool_attribute::CU_MEMPOOL_ATTR_USED_MEM_HIGH, 0)
    }

    fn pool(&self) -> Result<sys::CUmemoryPool> {
        let mut pool = std::ptr::null_mut();
        // SAFETY: the pointer is to a whole handle, which the call sets.
        driver("find its memory pool", unsafe {
            sys::cuDeviceGetDefaultMemPool(&mut pool, self.context().cu_device()).result()
        })?;
        Ok(pool)
    }

    fn set_pool_attribute(&self, attribute: sys::CUmemPool_attribute, mut value: u64) -> Result<()> {
        let pointer = (&raw mut value).cast::<c_void>();
        // SAFETY: the attributes set here are 64-bit integers, and the pointer is to one.
        driver("set up its memory pool", unsafe {
            sys::cuMemPoolSetAttribute(self.pool()?, attribute, pointer).result()
        })
    }

    pub(super) fn context(&self) -> std::sync::Arc<candle_core::cuda_backend::cudarc::driver::CudaContext> {
        self.0.cuda_stream().context().clone()
    }
}

/// The address of a tensor's first element.
///
/// It stays good while a clone of the tensor lives: the allocator works in the order of the one stream that everything
/// runs on, so memory freed after a launch is given away after the kernel has run.
///
/// Errors: a tensor on the CPU, or of a type that no kernel takes.
pub(super) fn address(tensor: &Tensor) -> Result<u64> {
    let (storage, layout) = tensor.storage_and_layout();
    let Storage::Cuda(storage) = &*storage else {
        return Err(Error::run("a GPU kernel got a tensor that is not on a GPU"));
    };
    let stream = storage.device.cuda_stream();
    let base = match &storage.slice {
        CudaStorageSlice::BF16(s) => s.device_ptr(&stream).0,
        CudaStorageSlice::F16(s) => s.device_ptr(&stream).0,
        CudaStorageSlice::F32(s) => s.device_ptr(&stream).0,
        CudaStorageSlice::F64(s) => s.device_ptr(&stream).0,
        CudaStorageSlice::U8(s) => s.device_ptr(&stream).0,
        CudaStorageSlice::U32(s) => s.device_ptr(&stream).0,
        CudaStorageSlice::I32(s) => s.device_ptr(&stream).0,
        CudaStorageSlice::I64(s) => s.device_ptr(&stream).0,
        _ => return Err(Error::run(format!("no GPU kernel takes {}", tensor.dtype().as_str()))),
    };
    Ok(base + (layout.start_offset() * tensor.dtype().size_in_bytes()) as u64)
}

/// A tensor whose elements a kernel will write, on the device of `like`.
pub(super) fn empty(shape: impl Into<candle_core::Shape>, dtype: candle_core::DType, like: &Tensor) -> Result<Tensor> {
    // SAFETY: every caller launches a kernel that writes each element before anything reads it; on the stream that both
    // run on, the write comes first.
    Ok(unsafe { Tensor::empty(shape, dtype, like.device()) }?)
}
