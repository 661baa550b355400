package load

import "time"

// A ring is a queue of times that keeps its memory.
type ring struct {
	buf  []time.Duration
	head int
	n    int
}

func (r *ring) len() int { return r.n }

func (r *ring) push(t time.Duration) {
	if r.n == len(r.buf) {
		grown := make([]time.Duration, max(4, 2*len(r.buf)))
		for i := range r.n {
			grown[i] = r.at(i)
		}
		r.buf, r.head = grown, 0
	}
	r.buf[(r.head+r.n)%len(r.buf)] = t
	r.n++
}

// at is the i-th oldest, 0 <= i < len.
func (r *ring) at(i int) time.Duration { return r.buf[(r.head+i)%len(r.buf)] }

func (r *ring) oldest() time.Duration { return r.at(0) }

func (r *ring) pop() time.Duration {
	t := r.at(0)
	r.head = (r.head + 1) % len(r.buf)
	r.n--
	return t
}
