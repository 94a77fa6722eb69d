//! `Device::Cuda`: what is refused without a GPU, and, ignored, what runs on one.

use crate::common::{assert_close, tensor};
use flashattn::cuda::{DeviceSlice, DeviceView};
use flashattn::spec::{Inputs, reference};
use flashattn::{
    AsView, Attention, AttentionProblem, DType, Device, DeviceGradients, DeviceTensors, Error, Plan,
    ScoreMod, Shape, Table, bf16, f16,
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
    assert_eq!(plan.gpu_backward().unwrap_err(), error);
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

    // The gradients, on host tensors and on the GPU's, the second time added to the first.
    let loss = tensor::<bf16>([2, 70, 4, 24], 4);
    let all = attention.backward(&q, &k, &v, &output, &loss, None).unwrap();
    let exact = reference::backward(p, &inputs, view("do", &loss), None).unwrap();
    let wide = |t: &flashattn::Tensor<bf16>| t.data().iter().map(|x| x.to_f32()).collect::<Vec<_>>();
    assert_close("dq", &wide(&all.dq), &exact.dq, 0.05);
    assert_close("dk", &wide(&all.dk), &exact.dk, 0.05);
    assert_close("dv", &wide(&all.dv), &exact.dv, 0.05);
    assert_close("dsinks", all.d_sinks.as_ref().unwrap(), &exact.d_sinks, 0.05);
    let made = [p.q_shape(), p.k_shape(), p.v_shape()]
        .map(|shape| gpu.alloc(2 * shape.into_iter().product::<usize>()).unwrap());
    let (loss, d_sinks) = (gpu.upload(&stream, loss.data()).unwrap(), gpu.alloc(16).unwrap());
    for accumulate in [false, true] {
        let gradients = DeviceGradients {
            d_o: at(&loss, p.o_shape()),
            d_lse: None,
            dq: at(&made[0], p.q_shape()),
            dk: at(&made[1], p.k_shape()),
            dv: at(&made[2], p.v_shape()),
            d_sinks: Some(DeviceSlice::new(&d_sinks, 0, 4).unwrap()),
            d_tables: &[],
            accumulate,
        };
        plan.backward_on(&stream, &tensors, &gradients, None).unwrap();
        plan.gpu_backward().unwrap().wait(&stream).unwrap();
        let got = made[2].read::<bf16>(&stream).unwrap();
        // Twice a number is that number, rounded or not.
        let times = if accumulate { 2.0 } else { 1.0 };
        assert!(got.iter().zip(all.dv.data()).all(|(a, b)| a.to_f32() == times * b.to_f32()));
        let got = d_sinks.read::<f32>(&stream).unwrap();
        assert!(got.iter().zip(all.d_sinks.as_ref().unwrap()).all(|(a, b)| *a == times * b));
    }
}

/// Same bits from run to run, which CPUs give anyway.
#[test]
fn deterministic_is_for_all_devices() {
    let (q, k, v) = (tensor::<bf16>(SHAPE, 1), tensor([2, 91, 2, 40], 2), tensor([2, 91, 2, 24], 3));
    let attention = Attention::new().causal();
    let output = attention.forward_with_lse(&q, &k, &v).unwrap();
    let one = attention.backward(&q, &k, &v, &output, &output.o, None).unwrap();
    let other = attention.deterministic(true).backward(&q, &k, &v, &output, &output.o, None).unwrap();
    assert!(one.dq == other.dq && one.dk == other.dk && one.dv == other.dv);
}

/// So have those of tables, in sums of which plans tell the bytes.
#[test]
#[ignore = "needs an NVIDIA GPU of the Hopper generation"]
fn deterministic_plans_sum_gradients_of_tables_exactly() {
    let (q, k, v) = (tensor::<bf16>(SHAPE, 1), tensor([2, 91, 2, 40], 2), tensor([2, 91, 2, 24], 3));
    let constant = Table::f32(&[1, 4, 1, 91], (0..4 * 91).map(|i| (i as f32).sin()).collect()).unwrap();
    let learned = constant.clone().with_grad().unwrap();
    let attention = |bias: &Table, device| {
        Attention::new().score_mod(ScoreMod::bias(bias.clone())).device(device).deterministic(true)
    };
    let output = attention(&learned, Device::Cpu).forward_with_lse(&q, &k, &v).unwrap();
    let gradient = |device| {
        let all = attention(&learned, device).backward(&q, &k, &v, &output, &output.o, None).unwrap();
        all.of_table(&learned).unwrap().to_vec()
    };
    let gpu = Device::Cuda(0);
    let first = gradient(gpu);
    assert!((0..10).all(|_| gradient(gpu) == first));
    let expected: Vec<f64> = gradient(Device::Cpu).into_iter().map(f64::from).collect();
    assert_close("the bias' gradient", &first, &expected, 2e-2);
    let bytes = |bias| attention(bias, gpu).plan::<bf16>(shape()).unwrap().backward_workspace_bytes();
    let sums = 104 * 4 * 91;
    assert!((sums..sums + 256).contains(&(bytes(&learned) - bytes(&constant))));
}
