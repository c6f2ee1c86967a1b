// What tensor cores do: matrices that a warp loads as a whole, its products, and a warpgroup's.
//
// The last lane of a warp to come computes for all of them. A product's terms are added up one after the other, in the order
// of k.
#include "emulator_machine.h"

namespace emulator {
namespace {

constexpr int ROWS = 16, DEPTH = 16, BAND = 8;  // of a warp's product, and columns of it that are computed together
constexpr size_t SHARE_BYTES = 16;              // what a lane reads of a right operand at a time: 8 elements

float float_of(uint16_t bits, bool is_half) {
  if (is_half) {
    _Float16 value;
    std::memcpy(&value, &bits, 2);
    return static_cast<float>(value);
  }
  const uint32_t wide = static_cast<uint32_t>(bits) << 16;
  float value;
  std::memcpy(&value, &wide, 4);
  return value;
}
uint16_t half_of(uint32_t pair, int which) { return static_cast<uint16_t>(pair >> 16 * which); }

// Row `half * 8` further down, and column, of a lane's element: two of them lie side by side.
int row_of(int lane, int half) { return lane / 4 + half * 8; }
int column_of(int lane, int which) { return lane % 4 * 2 + which; }

using Left = float[ROWS][DEPTH];

// `registers(lane)` are each lane's four.
template <class Registers>
void gather_left(Left& left, bool is_half, const Registers& registers) {
  for (int lane = 0; lane < WARP; ++lane)
    for (int i = 0; i < 8; ++i)
      left[row_of(lane, i / 2 % 2)][column_of(lane, i % 2) + i / 4 * 8] =
          float_of(half_of(registers(lane)[i / 2], i % 2), is_half);
}

// Eight columns: `sums(lane)` are each lane's four of them, `bits(k, column)` the right operand's elements.
template <class Bits, class Sums>
void multiply_band(const Left& left, bool is_half, bool add, const Bits& bits, const Sums& sums) {
  float right[DEPTH][BAND], out[ROWS][BAND];
  for (int k = 0; k < DEPTH; ++k)
    for (int column = 0; column < BAND; ++column) right[k][column] = float_of(bits(k, column), is_half);
  for (int lane = 0; lane < WARP; ++lane)
    for (int i = 0; i < 4; ++i) out[row_of(lane, i / 2)][column_of(lane, i % 2)] = add ? sums(lane)[i] : 0.0f;
  for (int row = 0; row < ROWS; ++row)
    for (int k = 0; k < DEPTH; ++k)
      for (int column = 0; column < BAND; ++column) out[row][column] += left[row][k] * right[k][column];
  for (int lane = 0; lane < WARP; ++lane)
    for (int i = 0; i < 4; ++i) sums(lane)[i] = out[row_of(lane, i / 2)][column_of(lane, i % 2)];
}

// Where element `k` of 16 of a column is.
uintptr_t place_of(const Product& product, int column, int k) {
  uintptr_t at = product.right;
  if (product.is_transposed)
    at += column / 64 * product.leading + k / 8 * product.stride + k % 8 * 128 + column % 64 * 2;
  else
    at += column / 8 * product.stride + column % 8 * 128 + k * 2;
  return at ^ (at >> 7 & 7) << 4;
}

// A warp reads all of the right operand: a column's 8 elements at a time or, transposed, those of 8 columns.
void touch_right(const Product& product) {
  for (int i = lane(); i < product.columns * 2; i += WARP) {
    const uintptr_t at =
        product.is_transposed ? place_of(product, i / DEPTH * 8, i % DEPTH) : place_of(product, i / 2, i % 2 * 8);
    touch(reinterpret_cast<const void*>(at), SHARE_BYTES, Access::PRODUCT, product.code);
  }
}

void multiply(const Product& product) {
  touch_right(product);
  meet_with(~0u, product, [&](const auto& of) {
    for (int lane = 0; lane < WARP; ++lane)
      if (of(lane).right != product.right || of(lane).add != product.add) fail("a warp whose lanes' products differ");
    Left left;
    gather_left(left, product.is_half, [&](int lane) { return of(lane).left; });
    for (int first = 0; first < product.columns; first += BAND) {
      const auto bits = [&](int k, int column) {
        return *reinterpret_cast<const uint16_t*>(place_of(product, first + column, k));
      };
      multiply_band(left, product.is_half, product.add, bits, [&](int lane) { return of(lane).sums + first / BAND * 4; });
    }
  });
}

}  // namespace

void multiply_fragments(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], bool is_half) {
  const struct { float* d; const uint32_t *a, *b; } mine = {d, a, b};
  meet_with(~0u, mine, [&](const auto& of) {
    Left left;
    gather_left(left, is_half, [&](int lane) { return of(lane).a; });
    const auto bits = [&](int k, int column) { return half_of(of(column * 4 + k % 8 / 2).b[k / 8], k % 2); };
    multiply_band(left, is_half, true, bits, [&](int lane) { return of(lane).d; });
  });
}

void load_matrices(uint32_t (&registers)[4], uintptr_t row, bool is_transposed) {
  const void* const code = __builtin_return_address(0);
  if (row % 16 != 0) fail("ldmatrix of an unaligned row");
  note_access(reinterpret_cast<const void*>(row), 16, false, code);
  struct { uintptr_t row, rows[WARP]; } mine = {row, {}};
  meet_with(~0u, mine, [](const auto& of) {
    for (int to = 0; to < WARP; ++to)
      for (int from = 0; from < WARP; ++from) of(to).rows[from] = of(from).row;
  });
  machine.is_uncounted = true;
  for (int matrix = 0; matrix < 4; ++matrix) {
    uint16_t two[2];
    for (int i = 0; i < 2; ++i) {
      const int first = lane() / 4, second = column_of(lane(), i);
      const uintptr_t at = mine.rows[matrix * 8 + (is_transposed ? second : first)];
      const auto* const element = reinterpret_cast<const uint16_t*>(at) + (is_transposed ? first : second);
      touch(element, 2, Access::READ, code);
      two[i] = *element;
    }
    std::memcpy(&registers[matrix], two, 4);
  }
  machine.is_uncounted = false;
}

void begin_product(Product product) {
  product.group = machine.fiber().product_group;
  product.code = __builtin_return_address(0);
  touch_right(product);
  machine.fiber().products.push_back(product);
}

void commit_products() { ++machine.fiber().product_group; }

void wait_products(int under_way) {
  Fiber& fiber = machine.fiber();
  while (!fiber.products.empty() && fiber.products.front().group < fiber.product_group - under_way) {
    multiply(fiber.products.front());
    fiber.products.pop_front();
  }
}

void show_to_products() { machine.fiber().shown_after.push_back(machine.fiber().barriers); }

}  // namespace emulator
