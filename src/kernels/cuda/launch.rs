//! Loading and launching the compiled kernels.
//!
//! A kernel is loaded once for each GPU: the cubin made for its architecture, else PTX that the driver compiles. Where
//! neither can be, the ops take their composed form, and that is said once, at the start.

use crate::error::{Error, Result};
use crate::kernels::cuda::file;
use crate::kernels::cuda::gpu::{Gpu, address, driver};
use crate::kernels::cuda::manifest::{ArgumentType, Kernel, Manifest, Target, TargetKind};
use crate::kernels::route::is_composed_only;
use candle_core::cuda_backend::cudarc::driver::{CudaFunction, LaunchConfig, PushKernelArg, sys};
use candle_core::cuda_backend::cudarc::nvrtc::Ptx;
use candle_core::{DType, Tensor};
use parking_lot::Mutex;
use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};

/// A kernel on one GPU.
struct Loaded {
    kernel: &'static Kernel,
    target: &'static Target,
    function: CudaFunction,
}

/// What a kernel is given for one of its arguments.
#[derive(Clone, Copy)]
pub(super) enum Arg<'a> {
    /// The address of a tensor's first element. Its strides are the op's concern.
    Tensor(&'a Tensor),
    /// A number.
    Int(usize),
    /// A number.
    Float(f32),
    /// A number.
    Double(f64),
}

/// Launches kernel `name` on the device and stream of `on`, with arguments by name in any order; `grid` are the numbers
/// beside them that its grid wants. False if the kernel does not run here: there is none for this GPU,
/// or an address or a number is not the multiple of 16 that its machine code was promised.
///
/// Errors: arguments that are not the kernel's (a mistake of the caller), a failed launch.
pub(super) fn launch(on: &Tensor, name: &str, args: &[(&str, Arg)], grid: &[(&str, usize)]) -> Result<bool> {
    let Some(loaded) = load(on, name)? else { return Ok(false) };
    let wrong = |what: String| Error::run(format!("GPU kernel `{name}` was called wrongly")).detail(what);
    let expected = &loaded.kernel.arguments;
    let mut values = Vec::with_capacity(args.len());
    for expected in expected {
        let arg = args.iter().find(|(name, _)| *name == expected.name).map(|(_, arg)| *arg);
        let value = arg.and_then(|arg| Value::of(arg, expected.ty));
        let value = value.ok_or_else(|| wrong(format!("`{}` wants {:?}", expected.name, expected.ty)))??;
        if expected.multiple_of_16 && !value.is_multiple_of_16() {
            return Ok(false);
        }
        values.push(value);
    }
    if args.len() != values.len() {
        return Err(wrong(format!("it takes {} arguments, not {}", values.len(), args.len())));
    }
    let number = |wanted: &str| {
        let by_name = args.iter().find_map(|(name, arg)| match arg {
            Arg::Int(n) if *name == wanted => Some(*n),
            _ => None,
        });
        by_name.or_else(|| grid.iter().find(|(name, _)| *name == wanted).map(|(_, n)| *n)).map(|n| n as i64)
    };
    let config = LaunchConfig {
        grid_dim: loaded.kernel.grid(loaded.target, number)?,
        block_dim: (32 * loaded.target.num_warps, 1, 1),
        shared_mem_bytes: loaded.target.shared_bytes,
    };
    let stream = on.device().as_cuda_device()?.cuda_stream();
    let mut builder = stream.launch_builder(&loaded.function);
    for value in &values {
        match value {
            Value::Address(v) => builder.arg(v),
            Value::I32(v) => builder.arg(v),
            Value::I64(v) => builder.arg(v),
            Value::F32(v) => builder.arg(v),
            Value::F64(v) => builder.arg(v),
        };
    }
    // Triton's scratch buffers, which no kernel here uses (a test of the manifest says so).
    let scratch = 0u64;
    builder.arg(&scratch).arg(&scratch);
    // SAFETY: number, order and types of the arguments are the manifest's, which was written with the machine code;
    // the tensors outlive the call and memory is freed in stream order (`address`); that shapes, strides and grid keep
    // the kernel inside them is what the ops in `ops` see to.
    let launched = unsafe { builder.launch(config) };
    driver(&format!("launch `{name}`"), launched.map(|_| ()))?;
    LAUNCHES.fetch_add(1, Ordering::Relaxed);
    Ok(true)
}

/// Whether kernel `name` would run on the device of `on`.
pub(super) fn runs(on: &Tensor, name: &str) -> bool {
    !is_composed_only() && on.device().is_cuda() && matches!(load(on, name), Ok(Some(_)))
}

/// The constant that kernel `name` was compiled with for the device of `on`.
pub(super) fn constant(on: &Tensor, name: &str, constant: &str) -> Result<Option<usize>> {
    Ok(load(on, name)?.and_then(|l| l.target.constants.get(constant).map(|&n| n as usize)))
}

/// An argument as the machine code takes it.
enum Value {
    Address(u64),
    I32(i32),
    I64(i64),
    F32(f32),
    F64(f64),
}

impl Value {
    /// `None` if the argument is of another type.
    fn of(arg: Arg, ty: ArgumentType) -> Option<Result<Self>> {
        let pointer =
            |dtype: DType, tensor: &Tensor| (tensor.dtype() == dtype).then(|| address(tensor).map(Self::Address));
        match (arg, ty) {
            (Arg::Tensor(t), ArgumentType::Bf16Pointer) => pointer(DType::BF16, t),
            (Arg::Tensor(t), ArgumentType::F16Pointer) => pointer(DType::F16, t),
            (Arg::Tensor(t), ArgumentType::F32Pointer) => pointer(DType::F32, t),
            (Arg::Tensor(t), ArgumentType::F64Pointer) => pointer(DType::F64, t),
            // Candle has no i8; bytes are bytes.
            (Arg::Tensor(t), ArgumentType::I8Pointer) => pointer(DType::U8, t),
            (Arg::Tensor(t), ArgumentType::I32Pointer) => pointer(DType::I32, t),
            (Arg::Tensor(t), ArgumentType::I64Pointer) => pointer(DType::I64, t),
            (Arg::Int(n), ArgumentType::I32) => i32::try_from(n).ok().map(|n| Ok(Self::I32(n))),
            (Arg::Int(n), ArgumentType::I64) => i64::try_from(n).ok().map(|n| Ok(Self::I64(n))),
            (Arg::Float(x), ArgumentType::F32) => Some(Ok(Self::F32(x))),
            (Arg::Double(x), ArgumentType::F64) => Some(Ok(Self::F64(x))),
            _ => None,
        }
    }

    fn is_multiple_of_16(&self) -> bool {
        match self {
            Self::Address(v) => v % 16 == 0,
            Self::I32(v) => v % 16 == 0,
            Self::I64(v) => v % 16 == 0,
            Self::F32(_) | Self::F64(_) => true,
        }
    }
}

type Table = HashMap<(candle_core::cuda_backend::DeviceId, String), Option<Arc<Loaded>>>;

/// The kernel on the device of `on`, loaded at the first call; `None` if kernels are switched off on this thread, or
/// this GPU has none of that name.
fn load(on: &Tensor, name: &str) -> Result<Option<Arc<Loaded>>> {
    static TABLE: OnceLock<Mutex<Table>> = OnceLock::new();
    if is_composed_only() {
        return Ok(None);
    }
    let device = on.device().as_cuda_device()?;
    let key = (device.id(), name.to_string());
    let mut table = TABLE.get_or_init(Mutex::default).lock();
    if let Some(loaded) = table.get(&key) {
        return Ok(loaded.clone());
    }
    let loaded = load_onto(&Gpu::of(on.device())?, name)?.map(Arc::new);
    table.insert(key, loaded.clone());
    Ok(loaded)
}

fn load_onto(gpu: &Gpu, name: &str) -> Result<Option<Loaded>> {
    let Ok(kernel) = Manifest::embedded().kernel(name) else { return Ok(None) };
    let Some(target) = kernel.target(gpu.capability()?) else { return Ok(None) };
    let bytes = file(&target.file).expect("the manifest and the files are written together");
    let code = match target.kind {
        TargetKind::Cubin => Ptx::from_binary(bytes.to_vec()),
        TargetKind::Ptx => Ptx::from_src(String::from_utf8_lossy(bytes).into_owned()),
    };
    let load = || -> Result<CudaFunction> {
        let module = driver(&format!("load `{}`", target.file), gpu.context().load_module(code))?;
        let function = driver(&format!("find `{}`", kernel.entry), module.load_function(&kernel.entry))?;
        // What a block may take without asking.
        if target.shared_bytes > 48 << 10 {
            let attribute = sys::CUfunction_attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
            let set = function.set_attribute(attribute, target.shared_bytes as i32);
            driver(&format!("give `{name}` {} bytes of shared memory", target.shared_bytes), set)?;
        }
        Ok(function)
    };
    match load() {
        Ok(function) => Ok(Some(Loaded { kernel, target, function })),
        // A driver may be too old for the code, or a card have less shared memory: slower, not wrong.
        Err(error) => {
            let why = error.to_string().lines().collect::<Vec<_>>().join(";");
            crate::progress::tell(format_args!("warning: the op of kernel `{name}` runs composed ({why})"));
            Ok(None)
        }
    }
}

/// Kernels launched so far by this process.
pub fn launches() -> u64 {
    LAUNCHES.load(Ordering::Relaxed)
}

static LAUNCHES: AtomicU64 = AtomicU64::new(0);

impl Gpu {
    /// Whether the compiled kernels run on this GPU.
    pub fn has_kernels(&self) -> bool {
        let kernels = &Manifest::embedded().kernels;
        self.capability().is_ok_and(|capability| kernels.iter().all(|kernel| kernel.target(capability).is_some()))
    }

    /// What the user should know of the kernels on this GPU: nothing if each has a cubin for it.
    pub fn kernels_note(&self) -> Option<String> {
        let capability = self.capability().ok()?;
        let targets = || Manifest::embedded().kernels.iter().map(|kernel| kernel.target(capability));
        let (major, minor) = (capability / 10, capability % 10);
        if targets().any(|t| t.is_none()) {
            return Some(format!(
                "no kernels were compiled for compute capability {major}.{minor}: ops run composed of candle's, several \
                 times slower"
            ));
        }
        let compiled_here = targets().flatten().any(|t| t.kind == TargetKind::Ptx);
        compiled_here.then(|| format!("the driver compiles the kernels for compute capability {major}.{minor}"))
    }
}
