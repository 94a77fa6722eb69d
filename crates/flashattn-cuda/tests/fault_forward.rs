//! On a GPU, in a process of its own: a kernel that goes astray ends every later call of its process.

use flashattn_cuda::{Device, DeviceSlice, DeviceView, Error, Forward, ForwardArgs};
use flashattn_spec::tensor::contiguous_strides;
use flashattn_spec::{AttentionProblem, DType};

#[test]
#[ignore = "needs an NVIDIA GPU of the Hopper generation"]
fn an_illegal_address_is_told_with_the_kernel_and_its_config() {
    let device = Device::open(0).expect("a GPU");
    let stream = device.stream().expect("a stream");
    let p = AttentionProblem::new(1, 1 << 20, 64, 64, DType::Bf16);
    let forward = Forward::new(&device, &p).expect("plans");
    // 1 MiB where q, k, v and o are said to have 8 GiB each.
    let small = device.alloc(1 << 20).expect("memory");
    let strides = contiguous_strides(p.q_shape());
    // SAFETY: it is not: the process ends with this test, and the GPU takes no harm.
    let view =
        unsafe { DeviceView::from_raw(0, small.address(), p.dtype, p.q_shape(), strides) }.expect("a view");
    // SAFETY: as above.
    let lse = unsafe { DeviceSlice::from_raw(0, small.address(), p.lse_len()) };
    let args = ForwardArgs { q: view, k: view, v: view, o: view, lse, sinks: None };
    forward.run(&stream, &args).expect("the launch does not wait");
    let error = forward.wait(&stream).expect_err("an illegal address");
    println!("{error}");
    let text = error.to_string();
    assert!(
        matches!(error, Error::Kernel { .. })
            && text.contains("flash_fwd_sm90")
            && text.contains("head_dim: 64")
    );
}
