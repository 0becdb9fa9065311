//! Cutting sequences that lie one after the other into tiles of rows, one task each.

/// A few consecutive rows of one sequence.
pub(super) struct Tile {
    /// The row, counted over all sequences, at which the tile's sequence begins.
    pub first: usize,
    /// The tile's first row within its sequence.
    pub start: usize,
    /// Number of rows.
    pub rows: usize,
}

/// Tiles of at most `size` rows, in order; none crosses the end of a sequence.
pub(super) fn tiles(lengths: &[usize], size: usize) -> Vec<Tile> {
    let mut all = Vec::new();
    let mut first = 0;
    for &n in lengths {
        all.extend((0..n).step_by(size).map(|start| Tile { first, start, rows: size.min(n - start) }));
        first += n;
    }
    all
}

/// Cuts rows of `width`, all sequences of them, into the parts that belong to the tiles.
pub(super) fn cut<'a>(mut rows: &'a mut [f32], tiles: &[Tile], width: usize) -> Vec<&'a mut [f32]> {
    let mut parts = Vec::with_capacity(tiles.len());
    for tile in tiles {
        let (part, rest) = rows.split_at_mut(tile.rows * width);
        parts.push(part);
        rows = rest;
    }
    parts
}
