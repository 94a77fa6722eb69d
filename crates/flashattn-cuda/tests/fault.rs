//! On a GPU, in a process of its own: a kernel that goes astray ends every later call of its process.

use flashattn_cuda::{Arg, Device, Error, Launch, Module};
use ptx::examples::vector_add;

#[test]
#[ignore = "needs an NVIDIA GPU"]
fn an_illegal_address_shows_at_the_next_wait() {
    let device = Device::open(0).expect("a GPU");
    let stream = device.stream().expect("a stream");
    let module = Module::load(&device, &vector_add()).expect("compiles");
    let args = [Arg::U64(16), Arg::U64(16), Arg::U64(16), Arg::U32(1)];
    // SAFETY: it is not: the process ends with this test, and the GPU takes no harm.
    unsafe { module.launch(&stream, &Launch::new([1, 1, 1]), &args) }.expect("the launch does not wait");
    let error = stream.synchronize().expect_err("an illegal address");
    assert!(matches!(&error, Error::Driver { call: "cuStreamSynchronize", code: 700, .. }), "{error}");
    println!("{error}");
}
