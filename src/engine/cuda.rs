//! Blocks on a GPU, through candle's CUDA backend.
//!
//! Nothing in this module knows of CUDA but [`open`]: it is written in candle's tensor operations, which run on any of
//! candle's devices. So all of it is tested on the processor, against the same references as the CPU's own engine and
//! against that engine itself; what remains for a machine with a GPU are candle's kernels. It runs the same
//! [`ModelSpec`](crate::model::spec::ModelSpec)s, beneath the same batcher, on the same pages.
//!
//! | | CPU | here |
//! |---|---|---|
//! | weights in bf16, f16, f32 | as they are | as they are |
//! | packed weights | in all formats | GGML's `q4_0` … `q8_0`, `q2_k` … `q6_k`; others are widened (`engine/cuda/upload.rs`) |
//! | products of packed weights | activations in f32 | activations rounded to 8 bits in blocks of 32 |
//! | products of floating point weights | activations in f32 | activations rounded to the weights' dtype, sums in f32 |
//! | everything else | f32 | f32 |
//! | KV cache | the engine's dtype | the engine's dtype |
//! | a token's bits | the same in any batch | may depend on the batch, as the library chooses its kernels by size |
//!
//! For the last reason a swarm calls a route exact only where [`Engine::kernel_path`](super::Engine::kernel_path) is the
//! same all along.
//!
//! # One wait a pass
//!
//! The host queues the whole pass and waits once, for its rows (`engine/cuda/span.rs`). Nothing on the way asks the device
//! for a number: masks are made from positions (`engine/cuda/plan.rs`), experts are chosen where the scores are, and what
//! isn't finite is found at the end. Only packed experts take a second wait, one a block (`engine/cuda/experts.rs`).
//!
//! # What a machine needs
//!
//! `cargo build --release --features cuda` takes NVIDIA's CUDA toolkit, 12 or 13 (`CUDA_HOME`), and `CUDA_COMPUTE_CAP` where no GPU is
//! at hand to be asked (80 for an A100, 86, 89, 90, …). candle links the driver's library and cuBLAS, cuRAND and NVRTC when the
//! program is built, so a binary with this feature starts only where `libcuda.so.1` and the toolkit's libraries are found; a
//! machine without them wants the binary without it.

mod attention;
mod block;
mod experts;
mod ffn;
mod linear;
mod norm;
mod plan;
mod span;
#[cfg(test)]
mod tests;
mod upload;

pub(super) use span::DeviceSpan;

/// Opens CUDA device `index`.
///
/// # Errors
/// In words for users: there is no driver, no such device, or it refuses.
#[cfg(feature = "cuda")]
pub(super) fn open(index: usize) -> Result<candle_core::Device, String> {
    // Built to load libcuda when it is first used, candle's bindings panic where they don't find it.
    let opened = std::panic::catch_unwind(|| candle_core::Device::new_cuda(index));
    match opened {
        Ok(Ok(device)) => Ok(device),
        Ok(Err(error)) => {
            Err(format!("CUDA device {index} can't be used ({error}): see nvidia-smi, or use --device cpu"))
        }
        Err(_) => Err("no CUDA driver (libcuda) is found on this machine: install it, or use --device cpu".to_owned()),
    }
}

/// What [`Engine::kernel_path`](super::Engine::kernel_path) says of a device: `cuda-sm90` for compute capability 9.0.
pub(super) fn path(device: &candle_core::Device) -> String {
    #[cfg(feature = "cuda")]
    if let candle_core::Device::Cuda(device) = device
        && let Ok((major, minor)) = device.cuda_stream().context().compute_capability()
    {
        return format!("cuda-sm{major}{minor}");
    }
    if device.is_cuda() { "cuda".to_owned() } else { "device".to_owned() }
}
