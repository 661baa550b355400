package supervise

// heading is where an attempt is going, as far as that is known.
func heading(t *attempt) *worker {
	switch {
	case t.To != nil:
		return workerOf(t.To)
	case t.Move != nil:
		return workerOf(t.Move.Dest)
	}
	return workerOf(t.Dest)
}

// shift freezes up to n sessions of one worker on their way to another, groups
// whole; fits says whether a group of size members may go when done sessions have
// been asked. It returns how many have been asked; full says that no more were because
// enough are under way.
func (s *Supervisor) shift(from, to *worker, n int, fits func(size, done int) bool) (done int, full bool) {
	// In batches, as emptyRetiring.
	now, room := s.now(), s.pace.window()-s.leaving(from)
	if n <= 0 || room < s.pace.window()/2 && room < n {
		return 0, n > 0
	}
	if room = s.throttled(from.pool, room); room <= 0 {
		return 0, true
	}
	var list []*session
	for _, ls := range from.Sessions {
		ss := sessionOf(ls)
		if done >= n || room <= 0 {
			break
		}
		if ss.Try != nil || ss.waits(now) {
			continue
		}
		g := ss.Group
		if g == nil {
			list = append(list, ss)
			done++
			room--
			continue
		}
		if g.Home != &from.Worker || !fits(len(g.Members), done) {
			continue // a member that is not at its group's home moves to it alone, when its worker is to go
		}
		if k := s.freezeGroup(g); k > 0 {
			g.Move.Dest = &to.Worker
			done += k
			room -= k
		}
	}
	if len(list) > 0 {
		s.freeze(from, list, to)
	}
	from.pool.asked(done)
	return done, room <= 0
}

// even is how far apart two workers may be: one session, or 5 percent of the mean.
func even(mean int) int { return max(1, mean/20) }

// loads counts for each worker that takes sessions those that it will have when all
// that is under way has arrived.
func (s *Supervisor) loads(p *pool) (loads map[*worker]int, underway int) {
	loads = map[*worker]int{}
	for _, w := range p.workers {
		if p.takes(w, p.serving) {
			loads[w] = len(w.Sessions)
		}
	}
	for a := range s.m.Tries() {
		if sessionOf(a.Session).pool != p {
			continue
		}
		from, to := workerOf(a.From), heading(a)
		if _, ok := loads[from]; ok && to != nil {
			loads[from]--
		}
		if _, ok := loads[to]; ok {
			loads[to]++
		}
		underway++
	}
	return loads, underway
}

// helps says whether moving size more sessions, after done, makes a difference of diff
// between two workers smaller.
func helps(size, done, diff int) bool { return size < diff-2*done }

// extremes are the worker with the most sessions, but for those that are stuck, and
// the one with the fewest.
func extremes(p *pool, loads map[*worker]int, stuck map[*worker]bool) (most, fewest *worker) {
	for _, w := range sortedWorkers(p.workers) {
		n, ok := loads[w]
		if !ok {
			continue
		}
		if !stuck[w] && (most == nil || n > loads[most]) {
			most = w
		}
		if fewest == nil || n < loads[fewest] {
			fewest = w
		}
	}
	return most, fewest
}

// spread moves sessions from the workers that have most to those that have fewest.
// What is asked to move at any time makes the difference smaller, so it comes to an
// end. It returns false when nothing is left to do: the workers are even, or what
// could move are groups too large to help.
func (s *Supervisor) spread(op *operation) bool {
	p := op.pool
	loads, underway := s.loads(p)
	if len(loads) < 2 {
		return underway > 0
	}
	total := 0
	for _, n := range loads {
		total += n
	}
	now, later, looked := s.now(), false, false
	stuck := map[*worker]bool{} // they have nothing that could move now
	for {
		most, fewest := extremes(p, loads, stuck)
		if most == nil || most == fewest || loads[most]-loads[fewest] <= even(total/len(loads)) {
			if looked { // through all sessions, and that not at every event
				op.scanAt = now.Add(tick / 2)
			}
			return underway > 0 || later
		}
		diff := loads[most] - loads[fewest]
		// Neither beyond the mean: what is moved is moved once.
		want := min(loads[most]-total/len(loads), (total+len(loads)-1)/len(loads)-loads[fewest])
		n, full := s.shift(most, fewest, want, func(size, done int) bool { return helps(size, done, diff) })
		if n == 0 {
			stuck[most] = true
			if full {
				later = true
				continue
			}
			looked = true
			for _, ls := range most.Sessions {
				ss := sessionOf(ls)
				if ss.Try == nil && ss.waits(now) {
					later = true
					break
				}
			}
			continue
		}
		loads[most] -= n
		loads[fewest] += n
		underway += n
	}
}
