package wire

import (
	"fmt"

	"github.com/ktlsvisor/ktlsvisor/internal/fault"
	"github.com/ktlsvisor/ktlsvisor/internal/sys"
)

// Handled is called when what m says has been done. It is a step at which a program that
// was built for that can be made to fail, and nothing else.
func (m *Message) Handled() {
	if fault.Enabled {
		fault.Step("handled-" + m.Type.String())
	}
}

// What follows runs only in programs that were built to be made to fail.

// sendFaulty is send with the faults that are wanted before and after it.
func (c *Channel) sendFaulty(m *Message) error {
	v := fault.At("before-send-" + m.Type.String())
	switch {
	case v.Err != nil:
		return fmt.Errorf("sendmsg: %w", v.Err)
	case v.Drop:
		return nil
	case v.Close:
		c.shut()
	case v.Fill:
		c.fill(m.Type)
	}
	err := c.send(m)
	if err == nil && v.Repeat {
		err = c.send(m)
	}
	if err == nil && fault.At("after-send-"+m.Type.String()).Close {
		c.shut()
	}
	return err
}

// recvFaulty is recv with the faults that are wanted once a message is there.
func (c *Channel) recvFaulty() (*Message, error) {
	for {
		m, err := c.recv()
		if err != nil {
			return m, err
		}
		switch v := fault.At("recv-" + m.Type.String()); {
		case v.Drop:
			m.CloseSockets()
			continue
		case v.Close:
			c.shut()
		}
		return m, nil
	}
}

// shut ends the channel for both ends, whoever else holds one of them.
func (c *Channel) shut() {
	fd, err := c.pc.Dup()
	if err != nil {
		return
	}
	_ = sys.ShutdownBoth(fd)
	sys.CloseAll([]int{fd})
}

// fill sends harmless messages until the peer's queue takes no more. CLOSED_ACK of nothing
// is from a supervisor, and a reply to an inventory that nobody asked for from a worker.
func (c *Channel) fill(t Type) {
	m := &Message{Type: TypeClosedAck}
	switch t {
	case TypeHello, TypeReady, TypeParked, TypeAdopted, TypeRefused, TypeClosed, TypeInventoryReply, TypeGroup, TypePong,
		TypeKeyUpdate, TypeWantUpdate, TypePaused, TypeSent:
		m = &Message{Type: TypeInventoryReply, Last: true}
	default:
	}
	b, err := Encode(m)
	for i := 0; i < 1<<14 && err == nil; i++ {
		err = c.pc.TrySend(b, nil)
	}
}
