//! `Device::Cuda`: what is refused without a GPU, and, ignored, what runs on one.

use crate::common::{assert_close, tensor};
use flashattn::cuda::{DeviceSlice, DeviceView};
use flashattn::spec::{Inputs, reference};
use flashattn::{
    AsView, Attention, AttentionProblem, DType, Device, DeviceTensors, Error, Plan, Shape, bf16, f16,
};

const SHAPE: [usize; 4] = [2, 70, 4, 40];

fn shape() -> Shape {
    Shape::of(SHAPE, [2, 91, 2, 40], [2, 91, 2, 24]).unwrap()
}

/// What the kernels do not take is refused by name, with or without a GPU.
#[test]
fn unsupported_problems_are_named() {
    let gpu = Attention::new().causal().device(Device::Cuda(0));
    let error = gpu.plan::<f32>(shape()).unwrap_err();
    assert!(matches!(error, Error::Unsupported { executor: Device::Cuda(0), .. }));
    assert_eq!(error.to_string(), "dtype: f32 (expected bf16 or f16) is not supported on cuda:0");
    let wide = Shape { head_dim: 264, ..shape() };
    let text =
        "head dimension: head_dim 264, head_dim_v 24 (expected at most 256 each) is not supported on cuda:0";
    assert_eq!(gpu.plan::<f16>(wide).unwrap_err().to_string(), text);
    let error = gpu.clone().dropout(2.0, 1).plan::<f16>(shape()).unwrap_err();
    assert!(matches!(error, Error::Problem(_)), "{error}");
}

/// A driver or GPU that is not there is an error of its own; where there is one, the plan is made.
#[test]
fn a_missing_gpu_is_an_error() {
    use flashattn::cuda;
    let plan = Attention::new().device(Device::Cuda(999)).plan::<bf16>(shape());
    let Err(Error::Cuda { executor: Device::Cuda(999), error }) = plan else { panic!("{plan:?}") };
    match (*error, cuda::Device::count()) {
        (cuda::Error::NoDevice { ordinal: 999, count }, Ok(all)) => assert_eq!(count, all),
        (opened, Err(counted)) => assert_eq!(opened, counted),
        (error, _) => panic!("{error}"),
    }
}

#[test]
fn plans_of_the_cpu_take_no_device_tensors() {
    let plan = Attention::new().plan::<bf16>(shape()).unwrap();
    let error = plan.gpu().unwrap_err();
    assert_eq!(error.to_string(), "a tensor in a GPU's memory is not supported on cpu");
}

#[test]
fn problems_are_checked_against_type_and_sinks() {
    let mut p = AttentionProblem::new(1, 8, 4, 16, DType::Bf16);
    assert!(Plan::<bf16>::from_problem(p.clone(), None, Device::Cpu).is_ok());
    let text = |error: Error| error.to_string();
    assert!(text(Plan::<f16>::from_problem(p.clone(), None, Device::Cpu).unwrap_err()).contains("bf16"));
    let sinks = || Some([0.0; 3].as_slice().into());
    let error = Plan::<bf16>::from_problem(p.clone(), sinks(), Device::Cpu).unwrap_err();
    assert!(text(error).starts_with("sinks"));
    p.sinks = true;
    assert!(text(Plan::<bf16>::from_problem(p.clone(), sinks(), Device::Cpu).unwrap_err()).contains("[4]"));
    assert!(Plan::<bf16>::from_problem(p.clone(), None, Device::Cpu).is_err());
    p.heads_kv = 3;
    assert!(Plan::<bf16>::from_problem(p, None, Device::Cpu).is_err());
}

#[test]
#[ignore = "needs an NVIDIA GPU of the Hopper generation"]
fn host_and_device_tensors_on_a_gpu() {
    let sinks = [0.5, -1.0, 0.0, 2.0];
    let attention = Attention::new().causal().softcap(20.0).sinks(&sinks).device(Device::Cuda(0));
    let (q, k, v) = (tensor::<bf16>(SHAPE, 1), tensor([2, 91, 2, 40], 2), tensor([2, 91, 2, 24], 3));
    let plan = attention.plan::<bf16>(shape()).unwrap();
    let output = plan.forward_alloc(&q, &k, &v).unwrap();
    let view = |x: &'static str, t| -> flashattn::View<'_, bf16> { AsView::to_view(t, x).unwrap() };
    let inputs = Inputs { q: view("q", &q), k: view("k", &k), v: view("v", &v), sinks: Some(&sinks) };
    let exact = reference::forward(plan.problem(), &inputs).unwrap();
    let o: Vec<f32> = output.o.data().iter().map(|x| x.to_f32()).collect();
    assert_close("o", &o, &exact.o, 0.05);
    assert_close("lse", &output.lse, &exact.lse, 1e-3);

    let (gpu, p) = (plan.gpu().unwrap().device(), plan.problem());
    let stream = gpu.stream().unwrap();
    let [dq, dk, dv] = [q.data(), k.data(), v.data()].map(|x| gpu.upload(&stream, x).unwrap());
    let (d_o, lse) = (gpu.alloc(2 * o.len()).unwrap(), gpu.alloc(4 * p.lse_len()).unwrap());
    let at = |buffer, shape| DeviceView::new(buffer, 0, DType::Bf16, shape).unwrap();
    let tensors = DeviceTensors {
        q: at(&dq, p.q_shape()),
        k: at(&dk, p.k_shape()),
        v: at(&dv, p.v_shape()),
        o: at(&d_o, p.o_shape()),
        lse: DeviceSlice::new(&lse, 0, p.lse_len()).unwrap(),
    };
    plan.forward_on(&stream, &tensors, None).unwrap();
    plan.gpu().unwrap().wait(&stream).unwrap();
    assert_eq!(
        d_o.read::<u16>(&stream).unwrap(),
        output.o.data().iter().map(|x| x.to_bits()).collect::<Vec<_>>()
    );
    assert_eq!(lse.read::<f32>(&stream).unwrap(), output.lse);

    let error = attention.backward(&q, &k, &v, &output, &output.o, None).unwrap_err();
    assert_eq!(error.to_string(), "the backward pass is not supported on cuda:0");
}
