package handoff

import (
	"time"

	"github.com/ktlsvisor/ktlsvisor/internal/wire"
)

// Handlers that were asked to return do so one after the other, and a PARKED for each
// would cost everybody on the way more than the sessions in it do. So PARKED waits a
// moment for others.
const (
	lingerItems = wire.MaxItems / 2
	lingerTime  = 500 * time.Microsecond
)

// gathering holds the sessions of the next PARKED. It belongs to the worker's loop.
type gathering struct {
	items []wire.Item
	timer *time.Timer
	set   bool
}

// due fires when the first of the items has waited long enough.
func (o *gathering) due() <-chan time.Time {
	if o.timer == nil {
		return nil
	}
	return o.timer.C
}

// parked tells the supervisor that s is at its safe point, together with others.
func (w *worker) parked(s *session) {
	o := &w.going
	o.items = append(o.items, s.parkedItem())
	switch {
	case len(o.items) >= lingerItems:
		w.sendParked()
	case o.timer == nil:
		o.timer, o.set = time.NewTimer(lingerTime), true
	case !o.set:
		o.timer.Reset(lingerTime)
		o.set = true
	}
}

// sendParked sends what has gathered; everything else that is sent comes after it.
func (w *worker) sendParked() {
	o := &w.going
	if o.set {
		o.timer.Stop()
		o.set = false
	}
	list := o.items
	o.items = nil
	for _, part := range wire.BatchItems(list) {
		w.send(&wire.Message{Type: wire.TypeParked, Items: part})
	}
}

// keepParked notes that what has gathered does not leave: nobody else has it.
func (w *worker) keepParked() {
	m := wire.Message{Items: w.going.items}
	w.going.items = nil
	w.keep(&m)
	for i := range m.Items {
		clear(m.Items[i].Cargo.Record)
	}
}
