#!/bin/sh
# The kernels' tests, and attention's, where `cargo test` doesn't take them: on instruction sets that the machine hasn't got, and
# with every access to memory checked. They are built as a small crate of their own around the same sources, which takes a minute:
# the whole one has 500 dependencies.
#
#   tests/kernels.sh check          whether it can still be built
#   tests/kernels.sh miri [TEST…]   AVX2, AVX-512 and VNNI, interpreted: kernels::tests::operations, and what else is asked for
#                                   (rustup toolchain install nightly --component miri,rust-src)
#   tests/kernels.sh asan [TEST…]   on this machine's own, with the address sanitizer (a nightly toolchain)
#   tests/kernels.sh neon [TEST…]   NEON, by QEMU (rustup target add aarch64-unknown-linux-gnu; qemu-user, gcc-aarch64-linux-gnu)
set -eu

root=$(cd "$(dirname "$0")/.." && pwd)
how=${1:-}
[ $# -eq 0 ] || shift
home=${KERNELS_HOME:-$root/target/kernels}
mkdir -p "$home/src/engine/matrix" "$home/src/engine/attention" "$home/src/model/checkpoint" "$home/candle/src"
cd "$home"

# With the versions that the whole crate is built with.
cp "$root/Cargo.lock" Cargo.lock
for file in floats.rs kernels.rs kernels exp.rs product.rs threads.rs alibi.rs pages.rs planes.rs matrix.rs matrix/blocks.rs matrix/k_blocks.rs \
    matrix/fp8.rs matrix/grouped.rs attention/kernel.rs attention/tile.rs attention/tests.rs; do
    ln -sfn "$root/src/engine/$file" "src/engine/$file"
done
ln -sfn "$root/src/model/dtype.rs" src/model/dtype.rs
ln -sfn "$root/src/model/checkpoint/matrix.rs" src/model/checkpoint/matrix.rs
# Its tests read checkpoints.
: > src/engine/matrix/tests.rs

cat > Cargo.toml << 'END'
[package]
name = "kernels"
version = "0.1.0"
edition = "2024"
[dependencies]
candle-core = { path = "candle" }
half = "2.7"
libm = "0.2"
pulp = { version = "0.22", default-features = false, features = ["std", "x86-v3", "x86-v4"] }
rayon = "1.12"
serde = { version = "1", features = ["derive"] }
thiserror = "2"
tracing = "0.1"
[dev-dependencies]
proptest = "1"
[profile.release]
opt-level = 1
[workspace]
END
cat > src/lib.rs << 'END'
#![allow(dead_code, unused_imports)]
pub mod engine {
    mod alibi;
    mod attention;
    mod exp;
    mod floats;
    mod kernels;
    mod load;
    mod matrix;
    mod pages;
    mod planes;
    mod product;
    mod threads;
}
pub mod model {
    pub mod dtype;
    pub use dtype::*;
    pub mod spec {
        #[derive(Debug)]
        pub struct AlibiSpec { pub factor: f64, pub rounding: super::Dtype }
    }
    pub mod checkpoint {
        mod matrix;
        pub use matrix::*;
        #[derive(Debug, Clone)]
        pub struct TensorData { pub dtype: super::Dtype, pub shape: Vec<usize>, pub bytes: Vec<u8> }
    }
}
END
cat > src/engine/attention.rs << 'END'
mod kernel;
mod tile;
pub(super) struct RowRun<'a> {
    pub(super) first_row: usize,
    pub(super) rows: usize,
    pub(super) position: usize,
    pub(super) pages: &'a [super::pages::PageId],
}
#[cfg(test)]
mod tests;
END
cat > src/engine/load.rs << 'END'
#[derive(Debug, thiserror::Error)]
pub enum LoadError {
    #[error("matrix {name}: {reason}")]
    Matrix { name: String, reason: String },
    #[error("{0}")]
    Tensor(#[from] candle_core::Error),
}
END
# What of candle the sources name: it rounds matrices to blocks, which no test here does, and has an error function to compare with.
cat > candle/Cargo.toml << 'END'
[package]
name = "candle-core"
version = "0.1.0"
edition = "2024"
[dependencies]
libm = "0.2"
END
cat > candle/src/lib.rs << 'END'
#[derive(Debug)]
pub struct Error(pub String);
impl std::fmt::Display for Error {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result { f.write_str(&self.0) }
}
impl std::error::Error for Error {}
pub type Result<T> = std::result::Result<T, Error>;
pub enum Device { Cpu }
pub struct Tensor;
impl Tensor { pub fn from_slice(_: &[f32], _: usize, _: &Device) -> Result<Self> { Ok(Self) } }
#[macro_export]
macro_rules! bail { ($($t:tt)*) => { return Err($crate::Error(format!($($t)*))) } }
pub mod quantized {
    #[allow(non_camel_case_types)]
    pub enum GgmlDType { Q8_0, Q4_0, Q4K, Q6K }
    pub struct QTensor;
    impl QTensor {
        pub fn quantize(_: &crate::Tensor, _: GgmlDType) -> crate::Result<Self> { Ok(Self) }
        pub fn data(&self) -> crate::Result<Vec<u8>> { Ok(Vec::new()) }
    }
}
pub mod cpu { pub mod erf { pub fn erf_f64(x: f64) -> f64 { libm::erf(x) } } }
END

case $how in
check)
    # Warnings are of what the whole crate uses and this one doesn't.
    RUSTFLAGS="${RUSTFLAGS:-} -Awarnings" cargo check --release --lib --tests
    ;;
miri)
    [ $# -gt 0 ] || set -- kernels::tests::operations
    export RUSTFLAGS="-Ctarget-feature=+avx2,+fma,+f16c,+bmi1,+bmi2,+lzcnt,+popcnt,+avxvnni,+avx512f,+avx512bw,+avx512cd,+avx512dq,+avx512vl,+avx512vnni"
    # Rayon's queues don't keep to the stricter rules, and its threads never end.
    export MIRIFLAGS="-Zmiri-disable-isolation -Zmiri-tree-borrows -Zmiri-permissive-provenance -Zmiri-ignore-leaks"
    export RAYON_NUM_THREADS=1
    cargo +nightly miri test --lib -- "$@"
    ;;
asan)
    export RUSTFLAGS=-Zsanitizer=address
    cargo +nightly test --release --lib --target x86_64-unknown-linux-gnu -- "$@"
    ;;
neon)
    export CARGO_TARGET_AARCH64_UNKNOWN_LINUX_GNU_LINKER=aarch64-linux-gnu-gcc
    export CARGO_TARGET_AARCH64_UNKNOWN_LINUX_GNU_RUNNER="qemu-aarch64 -L /usr/aarch64-linux-gnu"
    cargo test --release --lib --target aarch64-unknown-linux-gnu -- "$@"
    ;;
*)
    sed -n '2,/^set/s/^# \{0,1\}//p' "$root/tests/kernels.sh" >&2
    exit 1
    ;;
esac
