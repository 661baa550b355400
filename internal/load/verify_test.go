package load

import (
	"bytes"
	"errors"
	"slices"
	"testing"

	"pgregory.net/rapid"
)

// ledger is a book for tests without a network.
type ledger struct {
	frames   uint64 // sent
	lossFrom uint64 // frames from here ...
	lossTo   uint64 // ... to before here may be lost
	good     []uint64
	missing  int64
	gaps     int
}

func (l *ledger) sent() uint64 { return l.frames }
func (l *ledger) mayLose(first, last uint64) bool {
	return first >= l.lossFrom && last < l.lossTo
}
func (l *ledger) echoed(seq uint64, _ int) { l.good = append(l.good, seq) }
func (l *ledger) interrupted(_, _ uint64, bytes int64) {
	l.gaps++
	l.missing += bytes
}

func stream(g generator, from, to uint64) []byte {
	var b []byte
	for s := from; s < to; s++ {
		b = g.appendFrame(b, s)
	}
	return b
}

func testGenerator() generator { return generator{seed: 42, min: 16, max: 64} }

func TestVerifier(t *testing.T) {
	g := testGenerator()
	all := stream(g, 0, 10)
	frame := func(seq uint64) []byte { return g.appendFrame(nil, seq) }
	offset := func(seq uint64) int { return len(stream(g, 0, seq)) }
	with := func(edit func([]byte) []byte) []byte { return edit(slices.Clone(all)) }
	cut := func(from, to int) []byte { return with(func(b []byte) []byte { return slices.Delete(b, from, to) }) }

	tests := []struct {
		name         string
		got          []byte
		mayLose      bool
		wrong        bool // as opposed to right or interrupted
		gaps         int
		missing      int64
		good         int
		lossOnlyFrom uint64 // with mayLose: the first frame that may be lost
	}{
		{name: "everything", got: all, good: 10},
		{name: "flipped byte", got: with(func(b []byte) []byte { b[300] ^= 1; return b }), wrong: true},
		{name: "flipped checksum", got: with(func(b []byte) []byte { b[offset(1)-1] ^= 1; return b }), wrong: true},
		{name: "dropped byte", got: cut(300, 301), wrong: true},
		{name: "doubled byte", got: with(func(b []byte) []byte { return slices.Insert(b, 300, b[300]+1, b[300]) }), wrong: true},
		{name: "dropped frame", got: cut(offset(3), offset(4)), wrong: true},
		{name: "doubled frame", got: with(func(b []byte) []byte { return slices.Insert(b, offset(4), frame(3)...) }), wrong: true},
		{name: "swapped frames", got: slices.Concat(stream(g, 0, 3), frame(4), frame(3), stream(g, 5, 10)), wrong: true},
		{name: "unsent frame", got: slices.Concat(all, frame(10)), wrong: true},
		{name: "one byte too many", got: slices.Concat(all, []byte{0}), wrong: true},

		{name: "crash, whole frames lost", mayLose: true, got: cut(offset(3), offset(6)),
			gaps: 1, missing: int64(offset(6) - offset(3)), good: 7},
		{name: "crash, cut inside two frames", mayLose: true, got: cut(offset(3)+5, offset(6)+7),
			gaps: 1, missing: int64(offset(6) + 7 - offset(3) - 5), good: 6},
		{name: "crash, one byte lost", mayLose: true, got: cut(offset(3)+20, offset(3)+21),
			gaps: 1, missing: 1, good: 9},
		{name: "crash, a cut inside a magic", mayLose: true, got: cut(offset(3)+1, offset(3)+3),
			gaps: 1, missing: 2, good: 9},
		{name: "two crashes apart", mayLose: true,
			got:  slices.Concat(stream(g, 0, 2), stream(g, 3, 6), stream(g, 7, 10)),
			gaps: 2, missing: int64(g.frameLen(2) + g.frameLen(6)), good: 8},
		{name: "two crashes between two frames", mayLose: true,
			got:  slices.Concat(stream(g, 0, 3), frame(3)[:5], frame(4)[8:20], stream(g, 6, 10)),
			gaps: 1, missing: int64(len(stream(g, 3, 6)) - 17), good: 7},
		{name: "crash, rest not seen yet", mayLose: true, got: all[:offset(9)+3], good: 9},
		{name: "crash excuses no flip", mayLose: true, wrong: true,
			got: with(func(b []byte) []byte { b[300] ^= 1; return b })},
		{name: "crash excuses no flip beside a cut", mayLose: true, wrong: true,
			got: with(func(b []byte) []byte { b[offset(3)+1] ^= 1; return slices.Delete(b, offset(4)+5, offset(5)+5) })},
		{name: "crash excuses no doubled byte", mayLose: true, wrong: true,
			got: with(func(b []byte) []byte { return slices.Insert(b, 300, b[300]) })},
		{name: "crash excuses no doubled frame", mayLose: true, wrong: true,
			got: with(func(b []byte) []byte { return slices.Insert(b, offset(4), frame(3)...) })},
		{name: "crash excuses no swap", mayLose: true, wrong: true,
			got: slices.Concat(stream(g, 0, 3), frame(4), frame(3), stream(g, 5, 10))},
		{name: "crash excuses no made-up bytes", mayLose: true, wrong: true,
			got: slices.Concat(stream(g, 0, 3), bytes.Repeat([]byte("x"), len(all)))},
		{name: "gap before the crash", mayLose: true, lossOnlyFrom: 5, wrong: true,
			got: cut(offset(3), offset(4))},
	}
	for _, tt := range tests {
		for _, chunk := range []int{1, 7, 64, 1 << 20} {
			l := &ledger{frames: 10}
			if tt.mayLose {
				l.lossFrom, l.lossTo = tt.lossOnlyFrom, 10
			}
			err := feedChunks(&verifier{gen: g, book: l}, tt.got, chunk)
			if wrong, ok := errors.AsType[*WrongBytesError](err); ok != tt.wrong {
				t.Errorf("%s, %d bytes at a time: error %v, want one: %t", tt.name, chunk, err, tt.wrong)
			} else if ok && wrong.Wrong < 1 {
				t.Errorf("%s, %d bytes at a time: %d wrong bytes", tt.name, chunk, wrong.Wrong)
			}
			if !tt.wrong && (len(l.good) != tt.good || l.gaps != tt.gaps || l.missing != tt.missing) {
				t.Errorf("%s, %d bytes at a time: %d good frames, %d gaps, %d bytes missing, want %d, %d, %d",
					tt.name, chunk, len(l.good), l.gaps, l.missing, tt.good, tt.gaps, tt.missing)
			}
		}
	}
}

func feedChunks(v *verifier, b []byte, size int) error {
	for chunk := range slices.Chunk(b, size) {
		if err := v.feed(slices.Clone(chunk)); err != nil {
			return err
		}
	}
	return nil
}

// A crash takes one stretch of the stream. Wherever it is and however the
// stream is chunked, the verifier must say how long it was; and one changed
// byte more must never pass.
func TestVerifierGapProperty(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		g := generator{seed: rapid.Uint64().Draw(t, "seed"), max: rapid.IntRange(0, 100).Draw(t, "max")}
		const frames = 12
		all := stream(g, 0, frames)
		// Frames stay for the stream to go on with: more than one, because a
		// byte that is cut at the end of a frame may equal the one that
		// follows, and then only the next frame shows the gap.
		limit := len(stream(g, 0, frames-4))
		from := rapid.IntRange(0, limit-1).Draw(t, "from")
		to := rapid.IntRange(from+1, limit).Draw(t, "to")
		got := slices.Delete(slices.Clone(all), from, to)
		size := rapid.IntRange(1, 200).Draw(t, "chunk")

		l := &ledger{frames: frames, lossTo: frames}
		if err := feedChunks(&verifier{gen: g, book: l}, got, size); err != nil {
			t.Fatalf("a cut of %d bytes at %d: %v", to-from, from, err)
		}
		if l.missing != int64(to-from) || l.good[len(l.good)-1] != frames-1 {
			t.Fatalf("a cut of %d bytes at %d: %d missing, good frames %v", to-from, from, l.missing, l.good)
		}

		strict := &ledger{frames: frames}
		if err := feedChunks(&verifier{gen: g, book: strict}, got, size); err == nil {
			t.Fatalf("a cut of %d bytes at %d passed where nothing may be lost", to-from, from)
		}

		at := rapid.IntRange(0, len(got)-1).Draw(t, "at")
		if d := at - from; -8 < d && d < 8 {
			return // a few bytes between two cuts may be from anywhere
		}
		got[at] ^= byte(rapid.IntRange(1, 255).Draw(t, "flip"))
		if isRemainder(got, all) {
			return // in the header's zeros a flip can look like another cut
		}
		l = &ledger{frames: frames, lossTo: frames}
		err := feedChunks(&verifier{gen: g, book: l}, got, size)
		// A flip in the last frame leaves the search waiting for another.
		if err == nil && len(l.good) > 0 && l.good[len(l.good)-1] == frames-1 {
			t.Fatalf("a flipped byte at %d beside a cut of %d bytes at %d passed", at, to-from, from)
		}
	})
}

// Two clients, or two frames of one, must not share their bytes: an echo sent
// to the wrong session has to be seen.
func TestFramesDiffer(t *testing.T) {
	seen := map[string]string{}
	for seed := range uint64(50) {
		g := generator{seed: seed, min: 32, max: 32}
		for seq := range uint64(50) {
			f := g.appendFrame(nil, seq)
			payload := string(f[headerBytes : headerBytes+16])
			if before, ok := seen[payload]; ok {
				t.Fatalf("seed %d frame %d has the payload of %s", seed, seq, before)
			}
			seen[payload] = "another"
			if len(f) != g.frameLen(seq) || !intact(f) {
				t.Fatalf("seed %d frame %d: %d bytes, want %d; intact: %t", seed, seq, len(f), g.frameLen(seq), intact(f))
			}
		}
	}
}

func TestRing(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		var r ring
		var model []int
		for i, push := range rapid.SliceOf(rapid.Bool()).Draw(t, "ops") {
			if push {
				r.push(duration(i))
				model = append(model, i)
			} else if len(model) > 0 {
				if got := r.pop(); got != duration(model[0]) {
					t.Fatalf("popped %d, want %d", got, model[0])
				}
				model = model[1:]
			}
			if r.len() != len(model) {
				t.Fatalf("%d in the ring, want %d", r.len(), len(model))
			}
			for j, want := range model {
				if r.at(j) != duration(want) {
					t.Fatalf("at(%d) is %d, want %d", j, r.at(j), want)
				}
			}
		}
	})
}
