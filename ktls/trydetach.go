package ktls

import (
	"errors"
)

// ErrInUse: TryDetach met a Read, a Write or another call under way.
var ErrInUse = errors.New("the session is in use at this moment")

// TryDetach is Detach for a caller that must not wait: when anything is under way with
// the Conn it does nothing and returns ErrInUse.
func (c *Conn) TryDetach() (Socket, *State, error) {
	if !c.rmu.TryLock() {
		return nil, nil, ErrInUse
	}
	defer c.rmu.Unlock()
	if !c.wmu.TryLock() {
		return nil, nil, ErrInUse
	}
	defer c.wmu.Unlock()
	return c.detachLocked()
}
