//! Joint attention by the compiled kernels, see `kernels::attention` and `scripts/kernels/attention_*.py`.

use crate::error::{Error, Result};
use crate::kernels::attention::{Stream, TextLengths};
use crate::kernels::cuda::gpu::empty;
use crate::kernels::cuda::launch::Arg::{Int, Tensor as Data};
use crate::kernels::cuda::launch::{launch, runs};
use crate::kernels::tape::{Value, record};
use candle_core::{DType, Tensor};

/// [`joint_attention`](crate::kernels::attention::joint_attention); `None` if the kernels do not take these tensors:
/// other than bf16, heads that are not 64 or 128 wide.
pub fn joint_attention(text: Stream, image: Stream, heads: usize, lengths: &TextLengths) -> Result<Option<Vec<Value>>> {
    let inputs = [text.q, text.k, text.v, image.q, image.k, image.v];
    let (batch, text_tokens, width) = text.q.tensor().dims3()?;
    let head = width / heads;
    let takes = |v: &&Value| v.dtype() == DType::BF16 && v.tensor().is_contiguous();
    let names = ["attention_forward", "attention_backward_queries", "attention_backward_keys"];
    let on = image.q.tensor();
    if !inputs.iter().all(takes) || !names.iter().all(|name| runs(on, &format!("{name}_d{head}"))) {
        return Ok(None);
    }
    let shape = Shape { batch, heads, head, text_tokens, image_tokens: image.q.dims()[1], width };
    let forward = Forward {
        tensors: inputs.map(|v| v.tensor().clone()),
        outputs: [
            empty((batch, text_tokens, width), DType::BF16, on)?,
            empty((batch, shape.image_tokens, width), DType::BF16, on)?,
        ],
        lengths: lengths.on_device(on.device())?,
        log_sums: empty((batch, heads, text_tokens + shape.image_tokens), DType::F32, on)?,
        shape,
    };
    if !forward.launch()? {
        return Ok(None);
    }
    let outputs = forward.outputs.to_vec();
    Ok(Some(record(&inputs, outputs, move |grads| forward.backward(&grads))))
}

struct Shape {
    batch: usize,
    heads: usize,
    head: usize,
    text_tokens: usize,
    image_tokens: usize,
    width: usize,
}

/// What forward had and made.
struct Forward {
    tensors: [Tensor; 6],
    outputs: [Tensor; 2],
    /// Valid text tokens of each sample, (B,) i32.
    lengths: Tensor,
    /// Of every row of scores, base 2: (B, heads, S).
    log_sums: Tensor,
    shape: Shape,
}

impl Forward {
    fn launch(&self) -> Result<bool> {
        let [text_q, text_k, text_v, image_q, image_k, image_v] = &self.tensors;
        let s = &self.shape;
        let args = [
            ("TEXT_Q", Data(text_q)),
            ("TEXT_K", Data(text_k)),
            ("TEXT_V", Data(text_v)),
            ("TEXT_OUT", Data(&self.outputs[0])),
            ("IMAGE_Q", Data(image_q)),
            ("IMAGE_K", Data(image_k)),
            ("IMAGE_V", Data(image_v)),
            ("IMAGE_OUT", Data(&self.outputs[1])),
            ("LENGTHS", Data(&self.lengths)),
            ("LOG_SUMS", Data(&self.log_sums)),
            ("text_tokens", Int(s.text_tokens)),
            ("image_tokens", Int(s.image_tokens)),
            ("heads", Int(s.heads)),
            ("row_stride_qk", Int(s.width)),
            ("row_stride_v", Int(s.width)),
            ("row_stride_out", Int(s.width)),
        ];
        launch(image_q, &format!("attention_forward_d{}", s.head), &args, &[("samples", s.batch)])
    }

    /// Gradients of the six inputs.
    fn backward(&self, grads: &[Option<Tensor>]) -> Result<Vec<Option<Tensor>>> {
        let [text_q, text_k, text_v, image_q, image_k, image_v] = &self.tensors;
        let s = &self.shape;
        let image_grad = match &grads[1] {
            Some(grad) => grad.contiguous()?,
            None => image_q.zeros_like()?,
        };
        // Where nothing read the text's output its gradient is not read either; any address does.
        let text_grad = grads[0].as_ref().map_or(Ok(image_grad.clone()), Tensor::contiguous)?;
        let like = |t: &Tensor| empty(t.shape(), DType::BF16, t);
        let [d_text_q, d_text_k, d_text_v] = [like(text_q)?, like(text_k)?, like(text_v)?];
        let [d_image_q, d_image_k, d_image_v] = [like(image_q)?, like(image_k)?, like(image_v)?];
        let delta = empty(self.log_sums.shape(), DType::F32, image_q)?;
        let shared = [
            ("TEXT_Q", Data(text_q)),
            ("TEXT_K", Data(text_k)),
            ("TEXT_V", Data(text_v)),
            ("TEXT_GRAD", Data(&text_grad)),
            ("IMAGE_Q", Data(image_q)),
            ("IMAGE_K", Data(image_k)),
            ("IMAGE_V", Data(image_v)),
            ("IMAGE_GRAD", Data(&image_grad)),
            ("LENGTHS", Data(&self.lengths)),
            ("LOG_SUMS", Data(&self.log_sums)),
            ("DELTA", Data(&delta)),
            ("text_tokens", Int(s.text_tokens)),
            ("image_tokens", Int(s.image_tokens)),
            ("text_gradient", Int(usize::from(grads[0].is_some()))),
            ("heads", Int(s.heads)),
            ("row_stride_qk", Int(s.width)),
            ("row_stride_v", Int(s.width)),
            ("row_stride_out", Int(s.width)),
            ("row_stride_dqk", Int(s.width)),
        ];
        let run =
            |name: &str, own: &[(&str, crate::kernels::cuda::launch::Arg)]| -> Result<()> {
                let (name, args) = (format!("{name}_d{}", s.head), [&shared[..], own].concat());
                match launch(image_q, &name, &args, &[("samples", s.batch)])? {
                    true => Ok(()),
                    false => Err(Error::run(format!("GPU kernel `{name}` does not take these tensors"))
                        .detail(format!("image {:?}, text {:?}", image_q.dims(), text_q.dims()))),
                }
            };
        // In this order: the first writes DELTA, which the second reads.
        run(
            "attention_backward_queries",
            &[
                ("TEXT_OUT", Data(&self.outputs[0])),
                ("IMAGE_OUT", Data(&self.outputs[1])),
                ("TEXT_DQ", Data(&d_text_q)),
                ("IMAGE_DQ", Data(&d_image_q)),
            ],
        )?;
        run(
            "attention_backward_keys",
            &[
                ("TEXT_DK", Data(&d_text_k)),
                ("TEXT_DV", Data(&d_text_v)),
                ("IMAGE_DK", Data(&d_image_k)),
                ("IMAGE_DV", Data(&d_image_v)),
                ("row_stride_dv", Int(s.width)),
            ],
        )?;
        Ok([d_text_q, d_text_k, d_text_v, d_image_q, d_image_k, d_image_v].map(Some).into())
    }
}
