//! The parsers of safetensors and .npy files: whatever the bytes, an error, or tensors whose data is as long as their
//! shape and dtype say. libFuzzer watches that nothing large is allocated for what a header only claims.
#![no_main]

use std::borrow::Cow;

#[allow(dead_code, missing_docs, reason = "the command's own source; the target calls a part of it")]
#[path = "../../crates/flashattn-cli/src/tensor_file.rs"]
mod tensor_file;

use tensor_file::{Tensor, TensorFile, parse_npy};

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    if let Ok(tensor) = parse_npy(data) {
        check(&tensor);
    }
    if let Ok(file) = TensorFile::from_safetensors(data) {
        for name in file.tensors.keys() {
            check(file.get(name).expect("it was listed"));
        }
    }
});

fn check(tensor: &Tensor) {
    assert!(matches!(tensor.data, Cow::Borrowed(_)), "parsing copies nothing");
    let elements: usize = tensor.shape.iter().product();
    assert_eq!(elements.checked_mul(tensor.dtype.bitsize()), tensor.data.len().checked_mul(8));
    let _ = tensor.dimensions::<4>("[batch, seqlen, heads, head_dim]");
    if tensor.element_type().is_ok() {
        let lengths = [
            tensor.elements::<f32>().map(|x| x.len()),
            tensor.elements::<half::f16>().map(|x| x.len()),
            tensor.elements::<half::bf16>().map(|x| x.len()),
        ];
        let read: Vec<usize> = lengths.into_iter().filter_map(Result::ok).collect();
        assert_eq!(read, [elements], "exactly one type fits");
    }
    if let Ok(integers) = tensor.integers() {
        assert_eq!(integers.len(), elements);
    }
}
