// The function tables of one instruction set. Included last by the isa_*.cc files.

namespace fdserve {
namespace FD_ISA {

template <class E>
constexpr RowKernels make_row_kernels() {
#ifdef FD_AMX
  return {2 * TILE_ROWS,    to_tiles,  nullptr,              tile_gemm<TilePairs>,
          tile_gemm_groups, to_digits, tile_gemm<TileQuads>, to_bytes<E>,
#elif defined(FD_BF16)
  return {GEMM_ROWS, nullptr, nullptr, gemm<Pairs>, gemm_groups<E>, to_digits, gemm_bytes, to_bytes<E>,
#else
  return {GEMM_ROWS, nullptr, gemm<Floats>, gemm<WidePairs>, gemm_groups<E>, to_digits, gemm_bytes, to_bytes<E>,
#endif
          rms_norm_row<E>, swiglu_rows<E>, put_rows<E>,  add_row<E>,   rotate<E>,      store_key<E>,
          store_value<E>,  store_bytes_of<E, false>, store_bytes_of<E, true>,
#ifdef FD_AMX
          tile_attend};
#elif defined(FD_BF16)
          vector_attend};
#else
          attend<E>};
#endif
}

#ifdef FD_BF16
extern const RowKernels row_kernels = make_row_kernels<bf16>();
#else
extern const RowKernels row_kernels = make_row_kernels<float>();
extern const FloatKernels float_kernels = {
    axpy_row, softmax,  dots,    widen, merge,    finish,    quantize,  turn<false>, turn<true>,
    peak,     exp_sums, weights, split, at_least, mass_from, nth_equal, allow};
#endif

}  // namespace FD_ISA
}  // namespace fdserve
