//! Packed checkpoints compute what transformers computes from the numbers that they stand for, however they are cut.

use helion::model::Dtype;

macro_rules! packed {
    ($($name:ident: $fixture:literal,)*) => {$(
        mod $name {
            use super::Dtype;

            const FIXTURE: &str = concat!("packed-checkpoints/", $fixture);

            #[test]
            fn matches_the_reference() {
                super::super::matches_the_reference(FIXTURE);
            }

            #[test]
            fn cuts_and_chunks_change_nothing() {
                for dtype in [Dtype::F32, Dtype::Bf16] {
                    super::super::cuts_and_chunks_change_nothing(FIXTURE, dtype);
                }
            }
        }
    )*};
}

packed! {
    fp8_tiles: "fp8-qwen3",
    fp8_experts: "fp8-qwen3_moe",
    fp8_fused: "fp8-phi3",
    fp8_one_scale: "fp8-llama",
    fp8_rows: "fp8-qwen2",
    gptq_act_order: "gptq-llama",
    gptq_8_bits_fused: "gptq-phi3",
    gptq_experts: "gptq-qwen3_moe",
    awq_fused: "awq-phi3",
    awq_biases: "awq-qwen2",
    int4_zeros: "int4-qwen3",
    int8_rows: "int8-llama",
}
