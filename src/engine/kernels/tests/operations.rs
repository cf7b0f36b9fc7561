//! Every operation of every path against the portable one: bits equal, for the largest and smallest operands there may be.

use super::*;

/// All operations on some operands.
#[derive(Clone, Copy)]
struct Operations<'a> {
    floats: &'a [[f32; TILE]; 3],
    bytes: &'a [u8; 4 * TILE],
    row: [i8; 4],
}

impl Kernel for Operations<'_> {
    /// What each operation gave, with its name.
    type Output = Vec<(&'static str, [u32; TILE])>;

    #[inline(always)]
    fn on<A: Isa>(self, isa: A) -> Self::Output {
        let mut found = Vec::new();
        let mut keep = |name: &'static str, numbers: A::F| {
            let mut to = [f32::NAN; TILE];
            isa.store(numbers, &mut to);
            // What a NaN carries differs from machine to machine.
            found.push((name, to.map(|number| if number.is_nan() { f32::NAN.to_bits() } else { number.to_bits() })));
        };
        let [a, b, c] = self.floats.each_ref().map(|numbers| isa.load(numbers));
        keep("load", a);
        keep("splat", isa.splat(self.floats[0][3]));
        keep("mul", isa.mul(a, b));
        keep("fma", isa.fma(a, b, c));

        let (halves, others) = self.bytes.as_chunks::<{ 2 * TILE }>().0.split_at(1);
        keep("brains 0", isa.brains(self.bytes, 0));
        keep("brains 1", isa.brains(self.bytes, 1));
        keep("halves", isa.halves(&halves[0]));
        keep("more halves", isa.halves(&others[0]));
        for bytes in self.bytes.as_chunks().0 {
            keep("unsigned", isa.unsigned(bytes));
            keep("signed", isa.signed(bytes));
            keep("powers", isa.powers(bytes));
        }

        let whole = isa.bytes(self.bytes);
        let (low, high) = (isa.low(whole), isa.high(whole));
        let or = isa.or(low, isa.two_bits(whole, 1));
        let look_up = isa.look_up(&mxfp4_table(), high);
        let two_bits = [0, 1, 2, 3].map(|which| isa.two_bits(whole, which));
        let all = [low, high, or, look_up, two_bits[0], two_bits[1], two_bits[2], two_bits[3]];
        let names = ["low", "high", "or", "look_up", "two_bits 0", "two_bits 1", "two_bits 2", "two_bits 3"];
        for (name, bytes) in names.into_iter().zip(all) {
            for row in [[1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1], self.row] {
                keep(name, isa.to_f32(isa.total(isa.dot(isa.no_sum(), bytes, row))));
            }
        }
        // As many sums as there may be.
        for (name, bytes, count) in [("8 dots", low, 8), ("5 dots", look_up, 5), ("2 dots", or, 2)] {
            let mut sum = isa.no_sum();
            for _ in 0..count {
                sum = isa.dot(sum, bytes, self.row);
            }
            keep(name, isa.to_f32(isa.add_i(isa.total(sum), isa.splat_i(-1_234_567))));
        }
        let signed = isa.signed_bytes(self.bytes);
        let mut sum = isa.zeros();
        for _ in 0..8 {
            sum = isa.dot_signed(sum, signed, self.row);
        }
        let offset = -8 * A::OFFSET * self.row.iter().map(|code| i32::from(*code)).sum::<i32>();
        keep("dot_signed", isa.to_f32(isa.add_i(sum, isa.splat_i(offset))));

        let square: [[f32; 8]; 8] = std::array::from_fn(|row| std::array::from_fn(|column| (8 * row + column) as f32));
        let mut columns = [[0.0; TILE]; 8];
        isa.transpose(square.each_ref(), 0, &mut columns);
        isa.transpose(square.each_ref(), 8, &mut columns);
        columns.iter().for_each(|column| keep("transpose", isa.load(column)));
        isa.fetch(self.bytes);
        found
    }
}

#[test]
fn every_path_has_the_same_operations() {
    let special = [0.0, -0.0, 1e-45, -1e-39, f32::INFINITY, f32::NAN, f32::MAX, f32::MIN_POSITIVE];
    for seed in 0..if cfg!(miri) { 6 } else { 256 } {
        let mut floats = [[0.0; TILE]; 3];
        for (at, numbers) in floats.iter_mut().enumerate() {
            numbers.copy_from_slice(&random(TILE, 3 * seed + at as u32));
            numbers[(seed as usize + at) % TILE] = special[seed as usize % special.len()];
        }
        let mut bytes = [0; 4 * TILE];
        bytes.copy_from_slice(&random_bytes(4 * TILE, seed));
        match seed {
            0 => bytes = [0xFF; 4 * TILE],
            1 => bytes = [0x80; 4 * TILE],
            2 => bytes = [0x7F; 4 * TILE],
            3 => bytes = [0; 4 * TILE],
            _ => {}
        }
        let random_row = [0, 1, 2, 3].map(|at| (bytes[at] as i8).max(-127));
        for row in [[127; 4], [-127; 4], [127, -127, 127, -127], random_row] {
            let operations = Operations { floats: &floats, bytes: &bytes, row };
            let expected = Path::Portable.run(operations);
            for path in Path::all().into_iter().skip(1) {
                for (found, expected) in path.run_on_bytes(operations).iter().zip(&expected) {
                    assert_eq!(found, expected, "{} with {bytes:?} and {row:?}", path.name());
                }
            }
        }
    }
}
