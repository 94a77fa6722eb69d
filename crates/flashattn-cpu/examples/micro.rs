#![allow(missing_docs, clippy::all)]
use flashattn_cpu::gemm::*; use flashattn_cpu::arch::avx512::Avx512; use flashattn_cpu::memory::Buffer;
fn cpu() -> f64 { let mut t = libc::timespec { tv_sec: 0, tv_nsec: 0 }; unsafe { libc::clock_gettime(libc::CLOCK_PROCESS_CPUTIME_ID, &mut t) }; t.tv_sec as f64 + t.tv_nsec as f64 * 1e-9 }
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
unsafe fn go(rows: usize, v: usize, k: usize, a: Scalars, b: Vectors<*const f32>, c: Vectors<*mut f32>, i: Init) { unsafe { product::<Avx512>(rows, v, Depth { inner: k, outer: 1 }, a, b, c, i) } }
fn main() {
    let d = 64; let nk = 128;
    let mut k = Buffer::new(nk * d * 4); let mut q = Buffer::new(d * 64); let mut s = Buffer::new(nk * 64); let mut o = Buffer::new(d * 64);
    for (name, which) in [("S", 0), ("O", 1)] {
        let mut best = 1e9f64;
        for _ in 0..50 { let t = cpu(); for _ in 0..200 { unsafe {
            if which == 0 { go(nk, 4, d, Scalars { ptr: k.ptr(), row: 1, col: 16, block: 16 * d, outer: 0 }, Vectors { ptr: q.ptr(), vector: d * 16, row: 16 }, Vectors { ptr: s.ptr(), vector: nk * 16, row: 16 }, Init::Zero) }
            else { go(d, 4, nk, Scalars { ptr: k.ptr(), row: 1, col: 16, block: 16 * nk, outer: 0 }, Vectors { ptr: s.ptr(), vector: nk * 16, row: 16 }, Vectors { ptr: o.ptr(), vector: d * 16, row: 16 }, Init::Add) }
        } } best = best.min((cpu() - t) / 200.0); }
        println!("{name}: {:.0} GF/s/thread", 2.0 * (nk * 64 * d) as f64 / best / 1e9);
    }
}
